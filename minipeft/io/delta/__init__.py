"""Delta weights: a tuned model as its difference from a base, for those who have the base."""

from minipeft.io.delta.apply import apply_delta, check_delta
from minipeft.io.delta.make import make_delta
from minipeft.io.delta.record import DeltaReport

__all__ = ["DeltaReport", "apply_delta", "check_delta", "make_delta"]
