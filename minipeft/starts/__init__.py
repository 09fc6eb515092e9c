"""Where an adapter starts: `init=mp.starts.pissa()`; `eva(model, batches)` after injecting."""

from minipeft.starts.eva import eva
from minipeft.starts.factors import gaussian, olora, orthogonal, pissa
from minipeft.starts.loftq import loftq

__all__ = ["eva", "gaussian", "loftq", "olora", "orthogonal", "pissa"]
