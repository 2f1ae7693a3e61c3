"""Text that clients train on: where it comes from, how it is tokenised and who holds which rows."""
