"""Studies: a folder each, with the script that makes it (`python -m benchmarks.NAME.run`)."""
