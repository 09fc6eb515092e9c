"""One run of one method, in this process: the gate first, then the figures.

No figure is given for a case that computes something else than it should.
"""

import gc
import importlib
import math
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.protocol import is_packed
from minipeft.fast.flops import attention_on_a_cpu
from minipeft.inject import freeze
from minipeft.lora import LoRALinear
from minipeft.measure.memory import PeakMemory
from minipeft.measure.methods import Method, Prepared
from minipeft.model.memory import memory_report
from minipeft.qlora import NF4Linear

Loss = Callable[[Any, Any], Tensor]
Say = Callable[[dict[str, Any]], None]


class GateError(Exception):
    """A case does not compute what it should; it gets no figures."""


class Unsupported(Exception):
    """A method cannot be used with this model; the message says why."""


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that the model itself returns: `.loss`, or ["loss"], or a number."""
    out = called(model, batch)
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", out)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"the model returns {type(out).__name__}, and no loss; give benchmark a function "
            "loss=(model, batch) -> a number"
        )
    return loss


def called(model: Any, batch: Any) -> Any:
    """model(**batch) of a mapping, model(*batch) of a tuple or list, else model(batch)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device) for value in batch)
    return batch


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

    Raises:
        GateError: the case computes something else than it should.
        Unsupported: the method refuses this model.
    """
    if case.threads:
        torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    for name in case.method.imports:
        importlib.import_module(name)
    first = moved(case.make_batch(0), device)
    _warm_up(device)
    memory = PeakMemory(device)
    torch.manual_seed(case.seed)
    model = case.make_model().to(device).train()
    untouched = _loss_of_the_base(case, model, first)
    torch.manual_seed(case.seed)
    try:
        prepared = case.method.prepare(model, case.settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Unsupported(str(error)) from error
    prepared.model.train()
    del model
    gc.collect()
    gate_before(case, prepared, first, untouched)
    figures: dict[str, Any] = weight_figures(prepared.model)
    frozen = checksum(prepared.model)
    times, losses = _train(case, prepared.model, device, say)
    figures |= memory.figures()
    if checksum(prepared.model) != frozen:
        raise GateError("a frozen parameter changed in training")
    figures |= {"step_seconds": times, "train_losses": losses, "threads": torch.get_num_threads()}
    if case.flops:
        figures["flops"] = count_flops(case, prepared.model, first)
        figures["predicted_bytes"], figures["no_prediction"] = predicted(case, prepared, first)
    return figures | (case.after(prepared.model) if case.after else {})


def _warm_up(device: torch.device) -> None:
    """A step of a small layer: what a first step imports and compiles counts for no method."""
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 64)), 4).to(device)
    optimizer = optimizer_for(layer, 1e-3)
    layer(torch.ones(2, 64, device=device)).sum().backward()
    optimizer.step()


def _loss_of_the_base(case: Case, model: Any, batch: Any) -> float:
    """The loss before anything is added; statistics stand still, as they do below adapters."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    freeze(model)
    loss = _loss_now(case, model, batch)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return loss


def _loss_now(case: Case, model: Any, batch: Any) -> float:
    torch.manual_seed(case.seed)  # a model's own dropout draws the same each time
    with torch.no_grad():
        return float(case.loss(model, batch))


def gate_before(case: Case, prepared: Prepared, batch: Any, untouched: float) -> None:
    """Off, an adapter changes no bit of the loss; nor does it untrained, with B = 0.

    `untouched` is the loss of the base before; with 4-bit layers the base has changed.  A prefix
    does change the loss, untrained.
    """
    loss = _loss_now(case, prepared.model, batch)
    with prepared.adapters_off():
        without = _loss_now(case, prepared.model, batch)
    rounded = any(map(_is_4_bit, prepared.model.modules()))
    if prepared.adapters_off is not nullcontext and not rounded and without != untouched:
        raise GateError(f"loss {untouched} before, {without} with the adapter off")
    if not math.isfinite(loss):
        raise GateError(f"loss {loss} before training")
    if case.method.starts_at_base != (loss == without):
        raise GateError(
            f"loss {loss} with an untrained adapter, {without} without; where it does not start at "
            "the base, give Method(..., starts_at_base=False)"
        )


def _is_4_bit(module: nn.Module) -> bool:
    return is_packed(module) or type(module).__name__ == "Linear4bit"


def gate_gradients(model: Any) -> None:
    """After a backward: a finite gradient for everything that trains, none for the rest."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                raise GateError(f"{name} is frozen and got a gradient")
        elif parameter.grad is None:
            raise GateError(
                f"{name} trains and got no gradient: the loss does not use it; freeze it"
            )
        elif not bool(parameter.grad.isfinite().all()):
            raise GateError(f"{name} got no finite gradient")


def optimizer_for(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over what is trainable: the same for every method."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)


def _train(
    case: Case, model: Any, device: torch.device, say: Say
) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps: forward, backward and update."""
    rate = case.method.learning_rate if case.learning_rate is None else case.learning_rate
    optimizer = optimizer_for(model, rate)
    times: list[float] = []
    losses: list[float] = []
    for step in range(case.steps):
        batch = moved(case.make_batch(step), device)
        start = time.perf_counter()
        loss = case.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            paused = time.perf_counter()
            gate_gradients(model)
            start += time.perf_counter() - paused
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise GateError(f"loss {losses[-1]} at step {step}")
        say({"step": step + 1, "loss": losses[-1]})
    return times, losses


def count_flops(case: Case, model: Any, batch: Any) -> int:
    """FLOPs of forward and backward by torch's counter: a 4-bit product as a dense one.

    Attention on a CPU counts too, by the formulas of fast/flops.py.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=attention_on_a_cpu()) as counter:
        case.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return int(counter.get_total_flops())


def predicted(case: Case, prepared: Prepared, batch: Any) -> tuple[int | None, str | None]:
    """The peak that predict_memory says of such a step, or why it says none."""
    from minipeft.integrations.transformers.predict import predict_memory

    if case.method.is_peer:
        return None, "another library's"
    on_meta = moved(batch, torch.device("meta"))
    try:
        found = predict_memory(
            prepared.model, "as_it_is", batch=1, length=1,
            device="cuda" if case.device.startswith("cuda") else "cpu",
            forward=lambda model: case.loss(model, on_meta),
        )  # fmt: skip
    except Exception as error:  # whatever a model or a loss that reads values raises
        return None, f"{type(error).__name__}: {error}"
    return found.peak, None


def checksum(model: Any) -> int:
    """crc32 over every frozen parameter."""
    value = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            value = zlib.crc32(data.numpy().data, value)
    return value


def weight_figures(model: nn.Module) -> dict[str, float | int | None]:
    """Trainable parameters, bytes of all parameters and buffers, bits per 4-bit weight.

    Counted from the tensors, for bitsandbytes' layers too: codes, scales and scales of scales.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    packed_bytes = weights = 0
    for module in model.modules():
        if not _is_4_bit(module) or is_packed(module):
            continue
        layer: Any = module
        if (state := getattr(layer.weight, "quant_state", None)) is not None:
            extra = [state.absmax]
            if state.nested:
                extra += [state.state2.absmax, state.offset]
            tensors |= {id(t): t for t in extra}
            packed_bytes += layer.weight.nbytes + sum(t.nbytes for t in extra)
            weights += layer.in_features * layer.out_features
    bits: float | None = 8 * packed_bytes / weights if weights else None
    if bits is None and any(map(is_packed, model.modules())):
        bits = memory_report(model).packed.bits
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": sum(t.nbytes for t in tensors.values()),
        "bits_per_quantized_weight": bits,
    }
