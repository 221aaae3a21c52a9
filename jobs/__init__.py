"""DOING the work: one runnable door per kind of stage."""
