"""What a step costs: counted for a model, and modelled for a device that is not here."""
