"""Checkpoints on disk.

Here are commit, retention, capacity, formats of others, and consolidation into a model.
"""
