"""Read training checkpoints without their frameworks and stream them into half-precision model folders."""
