"""Reward labelling: every row of a data set scored once, whatever interrupts it."""
