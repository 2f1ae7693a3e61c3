"""Transports, which carry instructions to clients and replies back."""
