"""Data: sources of labelled text, tokenisation, and the partition of rows among clients."""
