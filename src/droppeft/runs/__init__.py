"""A run on disk: folder, ledger, checkpoints and exports; and the listeners of a run."""
