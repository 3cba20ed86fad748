"""Training: objective, optimiser, schedule, averaging, checkpoints, the loop."""
