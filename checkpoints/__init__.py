"""Checkpoints on disk: commit, retention, capacity, formats of others, and consolidation into a model."""
