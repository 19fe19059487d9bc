"""The training worker: model, data, loop, checkpoints. Does not know how it was launched."""
