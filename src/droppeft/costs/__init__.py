"""What a training step costs: counted for a model, and modelled for hardware that is not here."""
