"""A private Slurm for tests and trials.

The package has its configuration, its processes, and builds of other versions.
"""
