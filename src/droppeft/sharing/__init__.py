"""What of an adapter is shared, and how shared parts are merged."""
