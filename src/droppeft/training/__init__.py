"""One training loop, and what it needs: gradients, objectives, checkpointing, stored bytes."""
