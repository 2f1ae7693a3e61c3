"""The server: one round, validation of replies, evaluation, and a whole run."""
