"""Tasks: how batches, loss and metrics are computed."""
