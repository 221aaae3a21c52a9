"""Run jobs on a Slurm cluster: scripts, states, requeues, ranks under srun."""
