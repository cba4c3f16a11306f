"""Training: the loop, its schedules, evaluation, checkpoints and run directories."""
