"""Compare variants: which runs there are, running them, and summarising their results."""
