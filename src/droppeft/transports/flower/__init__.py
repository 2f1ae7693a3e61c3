"""The transport over Flower: messages, nodes, the simulation engine, and the ClientApp."""
