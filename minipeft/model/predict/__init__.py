"""Memory of a training step, found by running the step on tensors that have no values."""
