"""A private Slurm for tests and trials: its configuration, its processes, and builds of other versions."""
