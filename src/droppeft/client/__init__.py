"""Clients: running an instruction on a client's own rows, and saving its state."""
