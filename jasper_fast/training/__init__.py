"""What a training run is made of: the step, its figures, validation, checkpoints, optimisers and schedules."""
