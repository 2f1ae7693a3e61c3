"""What a step takes: measured on this machine, or planned for another one."""
