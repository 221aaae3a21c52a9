"""How other programs' checkpoint files are read.

They are read as tensors with their place, never by running a pickle.
"""
