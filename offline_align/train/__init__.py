"""The trainer: loop, optimizer step, metrics and checkpoints. It is independent of the stage that uses it."""
