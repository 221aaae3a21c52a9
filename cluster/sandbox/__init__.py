"""A private Slurm for tests and trials.

Its configuration, its processes, and builds of other versions.
"""
