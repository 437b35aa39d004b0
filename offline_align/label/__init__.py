"""Reward labelling: score every row of a data set exactly once, across interruptions."""
