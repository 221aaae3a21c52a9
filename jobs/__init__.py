"""DOING the work: one entry point per kind of stage."""
