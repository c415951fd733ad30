"""Stage-wise pruning."""
