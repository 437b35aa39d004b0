"""The one trainer: loop, optimizer step, metrics and checkpoints. It does not know which stage it serves."""
