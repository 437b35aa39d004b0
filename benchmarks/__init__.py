"""Benchmarks against peers and against the limit of the machine, measured side by side in one run."""
