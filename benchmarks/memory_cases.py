"""What `python -m benchmarks memory` measures: models, methods and sizes of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import minipeft as mp
from benchmarks.models import LlamaSizes, load_model, smollm2_folder


@dataclass(frozen=True)
class Case:
    """One training step."""

    model: str
    method: str
    checkpointing: bool
    batch: int
    length: int
    dtype: str

    def __str__(self) -> str:
        kept = ", checkpointing" if self.checkpointing else ""
        return f"{self.model} {self.method} {self.batch} x {self.length} {self.dtype}{kept}"


@dataclass(frozen=True)
class Model:
    """How a model is made with values, and a step that is worth measuring."""

    build: Callable[[torch.dtype], Any]
    empty: Callable[[torch.dtype], Any]  # on the meta device
    batch: int
    length: int


def _smollm2(dtype: torch.dtype) -> Any:
    model = load_model(None, dtype, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # pages of the file are no anonymous memory
            parameter.data = parameter.data.clone()
    return model


def _llama(sizes: LlamaSizes) -> Callable[[torch.dtype], Any]:
    return lambda dtype: load_model(sizes, dtype, 0)


def _smollm2_without_values(dtype: torch.dtype) -> Any:
    return mp.meta_model(smollm2_folder()).to(dtype)


def _without_values(sizes: LlamaSizes) -> Callable[[torch.dtype], Any]:
    def build(dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            return load_model(sizes, dtype, 0)

    return build


LAYER = LlamaSizes(4096, 11008, 1, 32, 32, 256)  # LLaMA-7B's, over few tokens
MODELS = {
    "smollm2": Model(_smollm2, _smollm2_without_values, 2, 256),
    "llama-7b-layer": Model(_llama(LAYER), _without_values(LAYER), 1, 512),
    "tiny": Model(_llama(LlamaSizes()), _without_values(LlamaSizes()), 1, 16),
}
METHODS = ("full", "lora", "dora", "qlora", "qdora", "prefix")
