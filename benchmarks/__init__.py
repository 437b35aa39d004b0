"""Measurements, side by side in one run, against peers and against the limit of the machine."""
