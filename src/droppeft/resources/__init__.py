"""What a training step takes: measured on this machine, or estimated for another one."""
