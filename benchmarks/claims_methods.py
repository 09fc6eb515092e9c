"""How an arm of the claims job prepares a model, and one training loop for all of them."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks.claims_arms import Arm

WARMUP = 0.1  # share of the steps; linear up, then linear down to 0
CLIP = 1.0  # norm of all gradients together
Groups = list[dict[str, Any]]


def starts(name: str | None) -> Any:
    """The function that LoRA's factors start by; None: the default, B = 0."""
    if name is None:
        return None
    return {"pissa": mp.starts.pissa, "loftq": mp.starts.loftq}[name]()


def prepare(model: Any, arm: Arm, target: Any, head: str | None) -> None:
    """Freeze and add what the arm's method trains; full fine-tuning leaves the model as it is.

    `target` is what LoRA wraps, `head` the name of a new output layer, which every arm trains.
    """
    chosen = dict(arm.settings)
    if arm.method in ("lora", "qlora"):
        inject = mp.inject_lora if arm.method == "lora" else mp.inject_qlora
        more = {key: chosen[key] for key in ("rank_stabilized", "dora") if key in chosen}
        init = starts(chosen.get("start"))
        inject(model, target, chosen["rank"], chosen["alpha"], init=init, head=head, **more)
    elif arm.method == "prefix":
        if head is not None:
            chosen["position"] = "none"  # an encoder keeps its position table
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an MLP may be large; it is dropped after training
            mp.attach_prefix(model, chosen.pop("length"), **chosen)
        return  # trains the head too
    elif arm.method == "prompt":
        mp.attach_prompt(model, chosen.pop("length"), **chosen)
        return
    elif arm.method not in ("full", "head"):
        raise ValueError(f"prepare: method={arm.method!r}; expected full, head, lora, qlora, "
                         "prefix or prompt")  # fmt: skip
    if head is not None and arm.method != "full":
        mp.train_modules(model, [head])


def groups_of(
    model: nn.Module, arm: Arm, rate: float, head: str | None, head_rate: float
) -> Groups:
    """Parameters and their rates: the new head has its own, LoRA+ gives B a multiple of A's."""
    found: dict[str, list[nn.Parameter]] = {"head": [], "b": [], "rest": []}
    plus = arm.settings.get("plus")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if head is not None and name.startswith(head):
            found["head"].append(parameter)
        elif plus is not None and name.endswith("lora_b"):
            found["b"].append(parameter)
        else:
            found["rest"].append(parameter)
    if plus is not None and not found["b"]:
        raise ValueError(f"groups_of: {arm.name} has no factor B for LoRA+")
    own = rate if arm.method == "head" else head_rate
    each = {"head": own, "b": rate * (plus or 1.0), "rest": rate}
    return [{"params": found[key], "lr": each[key]} for key in found if found[key]]


def train(
    model: Any, groups: Groups, steps: int, loss_at: Callable[[int], Tensor]
) -> dict[str, Any]:
    """AdamW without weight decay for so many steps; the mean loss of the last tenth, and seconds.

    A loss that is not a number ends the run, which then counts as the worst.
    """
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    model.train()
    begun, losses = time.perf_counter(), []
    for step in range(steps):
        loss = loss_at(step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    last = losses[-max(1, steps // 10) :]
    mean = sum(last) / len(last)
    return {
        "train_loss": mean if math.isfinite(mean) else None, "finite": math.isfinite(mean),
        "steps": len(losses), "train_seconds": time.perf_counter() - begun,
        "trainable": sum(p.numel() for p in parameters),
    }  # fmt: skip
