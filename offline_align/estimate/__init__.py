"""Estimate the parameters, memory and time of a run without torch; `dry_run=true` prints the result."""
