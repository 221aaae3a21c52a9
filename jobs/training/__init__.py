"""Training: the model in the one right order, rows to tokens, the loop."""
