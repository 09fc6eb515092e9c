"""One run of one method, in this process: the gate first, then the figures.

No figure is given for a case that computes something else than it should.
"""

import gc
import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minipeft.lora import LoRALinear
from minipeft.measure.figures import count_flops, predicted, weight_figures
from minipeft.measure.gate import (
    GateError,
    checksum,
    gate_before,
    gate_gradients,
    loss_of_the_base,
)
from minipeft.measure.loss import Loss, moved, own_loss
from minipeft.measure.memory import PeakMemory
from minipeft.measure.methods import Method, Unsupported
from minipeft.qlora import NF4Linear

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """Everything that one run needs; another process gets it pickled."""

    method: Method
    make_model: Callable[[], Any]
    make_batch: Callable[[int], Any]
    loss: Loss = own_loss
    steps: int = 4
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # target, head, rank, alpha, prefix_length
    learning_rate: float | None = None  # None: the method's
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    flops: bool = True
    after: Callable[[Any], dict[str, Any]] | None = None  # more figures of the trained model


def run(case: Case, say: Say = lambda values: None) -> dict[str, Any]:
    """Prepare, check, train: the figures of one method.

    `peak_bytes` is of everything: the model made, prepared, trained.  `step_peak_bytes` is of the
    steps after the first, when the optimiser's moments are there.

    Raises:
        LossError: the untouched model's loss is not one finite number.
        GateError: the case computes something else than it should.
        Unsupported: a package that the method needs cannot be imported.
        Exception: whatever the model, the batch, the loss and the method raise.
    """
    if case.threads:
        torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    for name in case.method.imports:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Unsupported(f"{name} cannot be imported: {error}") from error
    first = moved(case.make_batch(0), device)
    _warm_up(device)
    memory = PeakMemory(device)
    torch.manual_seed(case.seed)
    model = case.make_model().to(device).train()
    untouched = loss_of_the_base(case.loss, case.seed, model, first)
    torch.manual_seed(case.seed)
    prepared = case.method.prepare(model, case.settings)
    prepared.model.train()
    del model
    gc.collect()
    gate_before(
        case.loss, case.seed, prepared, first, untouched,
        starts_at_base=case.method.starts_at_base,
    )  # fmt: skip
    figures: dict[str, Any] = weight_figures(prepared.model)
    frozen = checksum(prepared.model)
    times, losses = _train(case, prepared.model, device, memory, say)
    peaks = memory.figures()
    figures["step_peak_bytes"] = peaks.pop("part_peak_bytes") if len(times) > 1 else None
    figures |= peaks
    if checksum(prepared.model) != frozen:
        raise GateError("a frozen parameter changed in training")
    figures |= {"step_seconds": times, "train_losses": losses, "threads": torch.get_num_threads()}
    if case.flops:
        figures["flops"] = count_flops(case.loss, prepared.model, first)
        figures["predicted_bytes"], figures["no_prediction"] = (
            (None, "another library's method") if case.method.is_peer
            else predicted(case.loss, prepared.model, first, device)
        )  # fmt: skip
    return figures | (case.after(prepared.model) if case.after else {})


def _warm_up(device: torch.device) -> None:
    """A step of a small layer: what a first step imports and compiles counts for no method."""
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 64)), 4).to(device)
    optimizer = optimizer_for(layer, 1e-3)
    layer(torch.ones(2, 64, device=device)).sum().backward()
    optimizer.step()


def optimizer_for(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over what is trainable: the same for every method."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)


def _train(
    case: Case, model: Any, device: torch.device, memory: PeakMemory, say: Say
) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps: forward, backward and update.

    The first step warms up and is not counted, so one step asked for makes two.
    """
    rate = case.method.learning_rate if case.learning_rate is None else case.learning_rate
    optimizer = optimizer_for(model, rate)
    times: list[float] = []
    losses: list[float] = []
    for step in range(max(case.steps, 2) if case.steps else 0):
        batch = moved(case.make_batch(step), device)
        if step == 1:
            memory.part()
        start = time.perf_counter()
        loss = case.loss(model, batch)
        if not loss.requires_grad:
            raise GateError("the loss depends on nothing that trains")
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            paused = time.perf_counter()
            gate_gradients(model)
            start += time.perf_counter() - paused
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise GateError(f"loss {losses[-1]} at step {step}")
        say({"step": step + 1, "loss": losses[-1]})
    return times, losses
