"""Estimate parameters, memory and time of a run without torch, for `plan` and `dry_run=true`."""
