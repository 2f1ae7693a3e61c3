"""The training loop, and its gradients, objectives, checkpointing and activation memory."""
