"""Rounds of Plans and Updates over a transport, and what is kept of them."""
