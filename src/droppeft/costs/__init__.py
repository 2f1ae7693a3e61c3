"""What a step costs: counted for a model, and modelled for a client that is not here."""
