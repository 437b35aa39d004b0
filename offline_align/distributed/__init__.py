"""Ranks: launchers, rendezvous, process groups, run locks, and megatron-core without a GPU."""
