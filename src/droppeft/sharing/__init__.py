"""Sharing: which layers of an adapter clients share, and how shared layers are merged."""
