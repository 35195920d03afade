"""Shared by models, datasets and the engine: boxes, batches, processes, logs, checkpoints, plots."""
