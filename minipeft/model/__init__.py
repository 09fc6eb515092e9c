"""Functions over a whole model, in place."""
