"""The parts of a training run: the step, its figures, validation, checkpoints, optimisers and schedules."""
