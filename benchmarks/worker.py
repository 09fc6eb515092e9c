"""One run of one method in a process of its own: `python -m benchmarks.worker CONFIG.json`.

Prints lines `progress {...}` while it works and `result {...}` at the end.  A gate comes first:
no time is measured for a case that computes something else than it should.
"""

import gc
import json
import math
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import IGNORED, Batches
from benchmarks.methods import METHODS, Prepared, optimizer_for, weight_figures
from benchmarks.models import LlamaSizes, enable_checkpointing, load_model


class GateError(Exception):
    """A case does not compute what it should; it gets no figures."""


def say(kind: str, **values: Any) -> None:
    """One line for the parent process."""
    print(kind, json.dumps(values), flush=True)


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM at its highest (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


class PeakMemory:
    """The highest memory since this object was made: process memory, or CUDA allocations."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from now
        self.before = resident_bytes("VmRSS")

    def figures(self) -> dict[str, int]:
        """Bytes: the peak above the process after its imports, and of the whole process."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            return {"peak_bytes": peak, "process_peak_bytes": peak}
        peak = resident_bytes("VmHWM")
        return {"peak_bytes": peak - self.before, "process_peak_bytes": peak}


def decoder_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The transformer without its head, and the head, through PEFT's wrapper if there is one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model, inner.lm_head


CHUNK = 256  # rows of logits at a time


def loss_of(model: Any, batch: Batches, *, chunked: bool = False) -> Tensor:
    """Mean cross-entropy of the next token where it is learnt.

    Logits are computed for those positions only: over a vocabulary of 49,152 they would take more
    memory than everything that the methods differ in.  `chunked` lets torch compute them and their
    gradients a few rows at a time; the loss has then the dtype of the model.
    """
    decoder, head = decoder_and_head(model)
    hidden = decoder(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    targets = batch.labels[:, 1:]
    learnt = targets != IGNORED
    rows, own = hidden[:, :-1][learnt], targets[learnt]
    if chunked:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
        return F.linear_cross_entropy(rows, head.weight, own, options=options)
    return F.cross_entropy(head(rows).float(), own)


def validation_loss(model: Any, batches: Batches, batch_size: int) -> float:
    """Mean over validation batches, weighted by learnt tokens.

    The model stays in train() mode, which changes nothing here (no dropout): eval() makes
    bitsandbytes repack its weights on some CPUs, after which it trains wrongly.
    """
    total = count = 0.0
    with torch.no_grad():
        for first in range(0, len(batches.input_ids), batch_size):
            batch = batches.rows(first, first + batch_size)
            learnt = float((batch.labels[:, 1:] != IGNORED).sum())
            total += float(loss_of(model, batch)) * learnt
            count += learnt
            say("progress", phase="validation")
    return total / count


def checksum(model: Any) -> int:
    """crc32 over every frozen parameter."""
    value = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            value = zlib.crc32(data.numpy().data, value)
    return value


def gate_before(prepared: Prepared, batch: Batches, untouched: float | None) -> None:
    """Off, an adapter changes no bit of the loss; nor does it untrained, with B = 0.

    `untouched` is the loss of the model before a prefix was attached, which does change it.
    """
    with torch.no_grad():
        loss = float(loss_of(prepared.model, batch))
        with prepared.adapters_off():
            without = float(loss_of(prepared.model, batch))
    if untouched is not None:
        if without != untouched or loss == untouched:
            raise GateError(f"loss {untouched}, with a prefix {loss}, switched off {without}")
    elif not math.isfinite(loss) or loss != without:
        raise GateError(f"loss {loss} with an untrained adapter, {without} without")


def gate_gradients(model: Any) -> None:
    """After a backward: a finite gradient for everything that trains, none for the rest."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                raise GateError(f"{name} is frozen and got a gradient")
        elif parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            raise GateError(f"{name} got no finite gradient")


def train(model: Any, batches: Batches, config: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds and losses of `steps` steps: forward, backward and update."""
    method = METHODS[config["method"]]
    optimizer = optimizer_for(model, config["learning_rate"] or method.learning_rate)
    cuda = batches.input_ids.is_cuda
    times, losses, size = [], [], config["batch"]
    for step in range(config["steps"]):
        batch = batches.rows(step * size, (step + 1) * size)
        start = time.perf_counter()
        loss = loss_of(model, batch, chunked=config["chunked_loss"])
        loss.backward()
        if step == 0:
            paused = time.perf_counter()
            gate_gradients(model)
            start += time.perf_counter() - paused
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise GateError(f"loss {losses[-1]} at step {step}")
        say("progress", phase="step", step=step + 1, loss=losses[-1])
    return times, losses


def load_batches(path: str, device: torch.device) -> tuple[Batches, Batches]:
    """Training and validation batches that the parent process wrote."""
    from safetensors.torch import load_file

    tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    train_, validation = (
        Batches(*(tensors[f"{part}.{field}"] for field in Batches._fields))
        for part in ("train", "validation")
    )
    return train_, validation


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Prepare, check, train, and evaluate one method; what the report shows of it."""
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    device = torch.device(config["device"])
    method = METHODS.get(config["method"])
    if config["method"].startswith("peft"):
        import peft  # noqa: F401  (before memory is measured)
    import transformers.models.llama.modeling_llama  # noqa: F401

    batches, validation = load_batches(config["batches"], device)
    memory = PeakMemory(device)
    sizes = None if config["sizes"] is None else LlamaSizes(**config["sizes"])
    model = load_model(sizes, getattr(torch, config["dtype"]), config["seed"]).to(device)
    if method is None:  # "base": the untouched model's loss
        loss = validation_loss(model, validation, config["batch"])
        return {
            "validation_loss": loss,
            "total_parameters": sum(p.numel() for p in model.parameters()),
        }
    if config["checkpointing"]:
        enable_checkpointing(model)
    first = batches.rows(0, config["batch"])
    untouched = None
    if not method.starts_at_base:
        with torch.no_grad():
            untouched = float(loss_of(model.train(), first))
    torch.manual_seed(config["seed"])
    prepared = method.prepare(model, config)
    prepared.model.train()
    del model
    gc.collect()
    gate_before(prepared, first, untouched)
    figures = weight_figures(prepared.model)
    frozen = checksum(prepared.model)
    times, losses = train(prepared.model, batches, config)
    peak = memory.figures()
    if checksum(prepared.model) != frozen:
        raise GateError("a frozen parameter changed in training")
    result: dict[str, Any] = {**figures, **peak, "step_seconds": times, "train_losses": losses}
    if config["validate"]:
        result["validation_loss"] = validation_loss(prepared.model, validation, config["batch"])
    return result


def main() -> None:
    """Run the configuration file named by the first argument."""
    config = json.loads(Path(sys.argv[1]).read_text())
    try:
        say("result", **run(config))
    except GateError as error:
        say("result", failed=f"gate: {error}")
    except (ImportError, NotImplementedError) as error:
        say("result", unsupported=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        say("result", failed="out of memory")
    except Exception as error:
        traceback.print_exc()
        say("result", failed=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
