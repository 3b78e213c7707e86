"""Training: stages, arguments, trainer, calibration, checkpoints."""
