"""Ranks: their arithmetic, process groups, and megatron-core on machines without a GPU."""
