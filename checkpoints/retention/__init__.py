"""Which checkpoints stay: pure functions from lists of checkpoints to decisions."""
