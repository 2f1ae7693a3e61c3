"""A client: what it does with an instruction, on its own rows, in the process that runs it."""
