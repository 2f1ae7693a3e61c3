"""What a model is trained to do: batches, loss and metrics."""
