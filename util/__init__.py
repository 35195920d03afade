"""What models, datasets and the engine share: boxes, batches, processes, logs, checkpoints, plots."""
