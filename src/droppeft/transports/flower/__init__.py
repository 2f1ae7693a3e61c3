"""Flower beneath the round loop: messages, nodes, its simulation, and the two apps."""
