"""Predicting in units, merging what was predicted, and scoring it."""
