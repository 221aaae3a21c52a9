"""Retention: pure functions from lists of checkpoints to decisions."""
