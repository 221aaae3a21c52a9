"""KEEPING: committed checkpoints, what stays of them, and the models made from them."""
