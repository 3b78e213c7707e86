"""Training data: records on disk, labels, batches, samplers and the check that runs before a launch."""
