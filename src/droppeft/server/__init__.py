"""The server: rounds, what it accepts, how it evaluates, and a whole run."""
