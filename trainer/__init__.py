"""The training loop and what it needs: step, loss, optimizers, checkpoints, metrics."""
