"""Methods side by side: which runs, playing them, and what they come to."""
