"""Parameters, memory and time of a run by arithmetic, without torch: what `dry_run=true` prints."""
