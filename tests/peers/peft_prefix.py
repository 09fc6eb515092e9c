"""The behaviours of prefix_behaviours.py measured on PEFT's prefix tuning, where PEFT has them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import enable_checkpointing
from tests.prefix_behaviours import GREEDY, Case, P, T, difference

TASKS = {"decoder": "CAUSAL_LM", "encoder": "TOKEN_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}


def attached(case: Case, *, tokens: bool = False) -> Any:
    """PEFT's model over the case's, from the keys and values of the prompt if `tokens`."""
    import peft

    plain = case.model
    if tokens:
        with torch.no_grad():
            cache = plain(case.prompt, use_cache=True).past_key_values
        flat = torch.cat(
            [torch.cat([_flat(layer.keys), _flat(layer.values)], 1) for layer in cache.layers], 1
        )
    model: Any = peft.get_peft_model(
        plain, peft.PrefixTuningConfig(task_type=TASKS[case.kind], num_virtual_tokens=P)
    ).eval()
    table = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(flat) if tokens else table.normal_(std=0.5)
    return model


def _flat(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1).reshape(P, -1)


def logits(model: Any, case: Case, **inputs: Any) -> Tensor:
    """Of the text."""
    inputs = case.inputs(**inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def as_tokens(family: str) -> float | None:
    """A prefix from the keys and values of real tokens against these tokens (decoders)."""
    case = Case(family)
    if case.kind != "decoder":
        return None
    with torch.no_grad():
        whole = torch.cat([case.prompt.expand(2, -1), case.text], 1)
        expected = case.model(whole).logits[:, P:]
    return difference(logits(attached(case, tokens=True), case)[:, -T:], expected)


def padded(family: str) -> float:
    """Text with padding on the left (decoders) or right against the bare text."""
    case = Case(family)
    model = attached(case)
    expected = logits(model, case)
    filler = torch.zeros(2, 3, dtype=torch.long)
    left = case.kind == "decoder"
    order = 1 if left else -1
    ids = torch.cat([filler, case.text][::order], 1)
    mask = torch.cat([filler, torch.ones_like(case.text)][::order], 1)
    more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left else {}
    found = logits(model, case, text=ids, attention_mask=mask, **more)
    if case.kind != "encoder-decoder":
        found = found[:, -T:] if left else found[:, :T]
        expected = expected[:, -T:]
    return difference(found, expected)


def window(family: str) -> float | None:
    """How far the least change of a token's logits, of 40 tokens, falls short of 1e-3."""
    case = Case(family)
    if not case.found.window:
        return None
    case.text = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    without = case.logits()
    model = attached(case)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    seen = logits(model, case)[:, -40:]
    return max(0.0, 1e-3 - float((seen - without).abs().amax(-1).min()))


def _generate(model: Any, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, **GREEDY | more)
    return tokens


def generated(family: str) -> float | None:
    """Greedy text, left padded or not, against the prompt as tokens: the share that differs."""
    case = Case(family)
    if case.kind != "decoder":
        return None
    whole = torch.cat([case.prompt.expand(2, -1), case.text], 1)
    expected = _generate(case.model, whole, torch.ones_like(whole))[:, P + T :]
    model = attached(case, tokens=True)
    ones, filler = torch.ones_like(case.text), torch.zeros(2, 3, dtype=torch.long)
    plain = _generate(model, case.text, ones)[:, T:]
    left = _generate(model, torch.cat([filler, case.text], 1), torch.cat([filler, ones], 1))
    return max(float((found != expected).float().mean()) for found in (plain, left[:, T + 3 :]))


def without_cache(family: str) -> float | None:
    """Greedy text without a cache against with one."""
    case = Case(family)
    if case.kind == "encoder":
        return None
    model, ones = attached(case), torch.ones_like(case.text)
    start = T if case.kind == "decoder" else 0
    found = [_generate(model, case.text, ones, use_cache=c)[:, start:] for c in (True, False)]
    return float((found[0] != found[1]).float().mean())


def checkpointed(family: str) -> float:
    """Gradients with checkpointing, switched on after wrapping, against without."""
    case = Case(family)
    case.model.config.use_cache = False
    model = attached(case).train()
    table = model.prompt_encoder["default"].embedding.weight

    def gradient() -> Tensor:
        model.zero_grad()
        inputs = case.inputs(attention_mask=torch.ones_like(case.text))
        model(**inputs).logits.square().mean().backward()
        found: Tensor = table.grad.clone()
        return found

    plain = gradient()
    enable_checkpointing(case.model, reentrant=False)
    try:
        return difference(gradient(), plain) / float(plain.abs().max())
    except AttributeError:  # no gradient at all, and no word of it
        return float("inf")


def mixed_rows(family: str) -> float | None:
    """Rows that name another adapter, or none, against each row's own run."""
    import peft

    case = Case(family)
    model = attached(case)
    config = peft.PrefixTuningConfig(task_type=TASKS[case.kind], num_virtual_tokens=P)
    model.add_adapter("other", config)
    with torch.no_grad():
        model.prompt_encoder["other"].embedding.weight.normal_(std=0.5)
    rows = ["default", "other"]
    together = logits(model, case, adapter_names=rows)
    worst = 0.0
    for i, name in enumerate(rows):
        model.set_adapter(name)
        worst = max(worst, difference(together[i], logits(model, case)[i]))
    return worst


def switched_off(family: str) -> float:
    """disable_adapter against the model before."""
    case = Case(family)
    before = case.logits(attention_mask=torch.ones_like(case.text))
    model = attached(case)
    with model.disable_adapter():
        off = logits(model, case)
    return difference(off, before)


IN_PEFT: dict[str, Callable[[str], float | None]] = {
    "as tokens": as_tokens, "padded": padded, "window": window, "generate": generated,
    "without cache": without_cache, "checkpointed": checkpointed, "rows": mixed_rows,
    "off": switched_off,
}  # fmt: skip
