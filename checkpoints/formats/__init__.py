"""How other programs' checkpoint files are read: as tensors with their place, never by running a pickle."""
