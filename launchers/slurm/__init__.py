"""The launcher of a Slurm cluster: batch scripts, states, continuation in a new job, and ranks under srun."""
