"""Rows that were predicted: units, merging, shards of others, export and scores. Files and numbers, no recipe."""
