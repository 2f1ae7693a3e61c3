"""What a run shows: on the screen now, in files and pictures later."""
