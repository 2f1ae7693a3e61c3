"""How instructions travel from the server to clients, and replies back."""
