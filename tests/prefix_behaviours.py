"""What keeps working with a prefix attached: each function measures one behaviour of one family.

Each returns the largest absolute difference between logits (or gradients, relative to the largest)
that ought to be equal, None where the architecture has no such behaviour; for generation, the
share of tokens that differ.  All in float32 unless they say otherwise.
"""

import copy
import inspect
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks.models import enable_checkpointing
from minipeft.adapters.state import named_tensors
from tests.prefix_families import FAMILIES, build

P, T = 5, 9  # prefix positions, tokens of text


class Case:
    """A model of one family, texts, and how to run it."""

    def __init__(self, family: str, **changes: Any) -> None:
        self.family, self.found = family, FAMILIES[family]
        self.model = build(family, **changes)
        draw = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, 97, (1, P), generator=draw)
        self.text = torch.randint(3, 97, (2, T), generator=draw)
        self.target = torch.randint(3, 97, (2, 7), generator=draw)  # of encoder-decoders

    @property
    def kind(self) -> str:
        """decoder, encoder or encoder-decoder."""
        return self.found.kind

    def inputs(self, text: Tensor | None = None, **more: Any) -> dict[str, Any]:
        """The arguments of a forward."""
        inputs = {"input_ids": self.text if text is None else text, **more}
        if self.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = self.target
        return inputs

    def logits(self, **more: Any) -> Tensor:
        """Of the text."""
        with torch.no_grad():
            logits: Tensor = self.model(**self.inputs(**more)).logits
        return logits

    def attach(self, *, tokens: bool = True, **settings: Any) -> Any:
        """A prefix, of the prompt's keys and values if `tokens`."""
        prefix = mp.attach_prefix(self.model, P, train_head=False, **settings)
        if tokens:
            decoder = {"decoder_input_ids": self.prompt} if self.kind == "encoder-decoder" else {}
            prefix.load_tokens(self.prompt, **decoder)
        return prefix

    def window(self) -> str | None:
        """The setting under which a prefix is like tokens."""
        return "like_token" if self.found.window and self.kind == "decoder" else None


def random_lora(model: nn.Module) -> None:
    """LoRA on every linear layer that already changes the output."""
    head = "classifier" if hasattr(model, "classifier") else None  # it stays as it is
    mp.inject_lora(model, "all-linear", rank=2, head=head)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute one."""
    return float((a.detach().float() - b.detach().float()).abs().max())


def _only_itself(batch: int, total: int, queries: int | None = None) -> Tensor:
    """A mask (batch, 1, queries, total) in which the first P see only themselves."""
    mask = torch.ones(batch, 1, queries or total, total, dtype=torch.bool)
    mask[:, :, :P, P:] = False
    return mask


@torch.no_grad()
def as_tokens(family: str) -> float | None:
    """A prefix from the keys and values of real tokens against these tokens before the text.

    In an encoder these tokens see each other only, which the reference's mask says, and are not
    counted; an encoder with windows has no such reference.
    """
    case = Case(family)
    model, whole = case.model, torch.cat([case.prompt.expand(2, -1), case.text], 1)
    if case.kind == "decoder":
        expected = model(whole).logits[:, P:]
    elif case.kind == "encoder":
        if case.found.window:
            return None
        mask = _only_itself(2, P + T)
        expected = model(**_numbered(model, whole), attention_mask=mask).logits[:, P:]
    else:
        encoded = model.get_encoder()(whole, attention_mask=_only_itself(2, P + T))
        target = torch.cat([case.prompt.expand(2, -1), case.target], 1)
        expected = model(
            encoder_outputs=encoded, decoder_input_ids=target,
            attention_mask=_only_itself(2, P + T, P + 7),
        ).logits[:, P:]  # fmt: skip
    case.attach(window=case.window())
    return difference(case.logits(), expected)


def _numbered(model: Any, whole: Tensor) -> dict[str, Tensor]:
    """The prompt numbered from 0, and the text too, as with position "none"."""
    numbers = torch.cat([torch.arange(P), torch.arange(T)])[None]
    first = 1 if "Roberta" in type(model).__name__ else 0  # behind the padding id
    return {"input_ids": whole, "position_ids": numbers + first}


@torch.no_grad()
def padded(family: str) -> float:
    """Text with padding on the left (decoders) and on the right against the bare text."""
    case = Case(family)
    case.attach(window=case.window())
    expected, worst = case.logits(), 0.0
    filler = torch.zeros(2, 3, dtype=torch.long)
    sides = ("left", "right") if case.kind == "decoder" else ("right",)
    for side in sides:
        pair = [filler, torch.ones_like(case.text)][:: 1 if side == "left" else -1]
        mask = torch.cat(pair, 1)
        ids = torch.cat([filler, case.text][:: 1 if side == "left" else -1], 1)
        inputs = case.inputs(ids, attention_mask=mask)
        if side == "left" and "position_ids" in _names(case.model):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = case.model(**inputs).logits
        if case.kind != "encoder-decoder":
            logits = logits[:, 3:] if side == "left" else logits[:, :T]
        worst = max(worst, difference(logits, expected))
    return worst


def _names(model: Any) -> Any:
    return inspect.signature(model.forward).parameters


@torch.no_grad()
def seen_from_everywhere(family: str) -> float | None:
    """With a window and window="always": how far the least change of a token's logits, of 40
    tokens, falls short of 1e-3; 0.0 where every token sees the prefix."""
    case = Case(family)
    if not case.found.window:
        return None
    case.text = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    without = case.logits()
    case.attach(tokens=False, init_std=1.0)
    return max(0.0, 1e-3 - float((case.logits() - without).abs().amax(-1).min()))


GREEDY = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
MODES = {
    "greedy": GREEDY, "without cache": GREEDY | {"use_cache": False},
    "beam search": GREEDY | {"num_beams": 3}, "sampling": GREEDY | {"do_sample": True},
}  # fmt: skip


def _generate(case: Case, ids: Tensor, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        tokens: Tensor = case.model.generate(ids, **settings)  # type: ignore[operator]
    start = ids.shape[1] if case.kind == "decoder" else 0
    return tokens[:, start:]


def generated(family: str) -> float | None:
    """Greedy, sampled and beam-search text, with and without cache, left padded or not.

    Against the same with the prompt as tokens (decoders), or without a cache.
    """
    case = Case(family)
    if case.kind == "encoder":
        return None
    whole = torch.cat([case.prompt.expand(2, -1), case.text], 1)
    expected = {}
    if case.kind == "decoder":
        expected = {name: _generate(case, whole, **settings) for name, settings in MODES.items()}
    case.attach(window=case.window())
    found = {name: _generate(case, case.text, **settings) for name, settings in MODES.items()}
    if case.kind == "encoder-decoder":
        expected = {
            "greedy": found["without cache"],
            "beam search": _generate(case, case.text, **MODES["beam search"], use_cache=False),
        }
    else:
        filler = torch.zeros(2, 3, dtype=torch.long)
        found["left padded"] = _generate(
            case, torch.cat([filler, case.text], 1), **GREEDY,
            attention_mask=torch.cat([filler, torch.ones_like(case.text)], 1),
        )  # fmt: skip
        expected["left padded"] = expected["greedy"]
    wrong = [float((found[name] != tokens).float().mean()) for name, tokens in expected.items()]
    return max(wrong)


def static_cache(family: str) -> float | None:
    """Greedy text with a static cache against the dynamic one."""
    case = Case(family)
    if case.kind == "encoder":
        return None
    plain = _generate(case, case.text, **GREEDY)
    try:
        static = _generate(case, case.text, **GREEDY, cache_implementation="static")
    except Exception:
        return None  # the plain model cannot either
    if not torch.equal(plain, static):
        return None
    case.attach(window=case.window())
    static = _generate(case, case.text, **GREEDY, cache_implementation="static")
    return float((static != _generate(case, case.text, **GREEDY)).float().mean())


@torch.no_grad()
def own_cache(family: str) -> float | None:
    """Two turns on a cache of the user's own, which holds real tokens only, against one run."""
    from transformers import DynamicCache

    case = Case(family)
    if case.kind != "decoder":
        return None
    case.attach(window=case.window())
    whole = case.logits()
    cache = DynamicCache(config=case.model.config)
    first = case.model(case.text[:, :4], past_key_values=cache, use_cache=True)
    if first.past_key_values is not cache or cache.get_seq_length() != 4:
        return float("inf")
    rest = case.model(
        case.text[:, 4:], past_key_values=cache, attention_mask=torch.ones_like(case.text),
        use_cache=True,
    )  # fmt: skip
    return difference(torch.cat([first.logits, rest.logits], 1), whole)


@torch.no_grad()
def given_embeddings(family: str) -> float:
    """inputs_embeds against input_ids."""
    case = Case(family)
    case.attach(window=case.window())
    inputs = case.inputs()
    embedded = case.model.get_input_embeddings()(inputs.pop("input_ids"))  # type: ignore[operator]
    return difference(case.model(inputs_embeds=embedded, **inputs).logits, case.logits())


def _gradients(case: Case, prefix: nn.Module) -> dict[str, Tensor]:
    case.model.zero_grad()
    logits = case.model(**case.inputs()).logits
    logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in prefix.named_parameters() if p.grad is not None}


def checkpointed(family: str) -> float:
    """Gradients with checkpointing, re-entrant and not, of a table and an MLP, against without."""
    worst = 0.0
    for hidden in (None, 8):
        case = Case(family)
        case.model.train()
        case.model.config.use_cache = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the size of the MLP
            prefix = case.attach(tokens=False, hidden=hidden, window=case.window())
        plain = _gradients(case, prefix)
        if not plain or not all(g.abs().max() > 0 for g in plain.values()):
            return float("inf")
        for reentrant in (False, True):
            enable_checkpointing(case.model, reentrant=reentrant)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = _gradients(case, prefix)
            if set(again) != set(plain):
                return float("inf")
            worst = max(
                worst, *(difference(again[n], g) / float(g.abs().max()) for n, g in plain.items())
            )
    return worst


def compiled(family: str) -> float:
    """torch.compile (aot_eager) against eager, forward and gradients."""
    case = Case(family)
    prefix = case.attach(tokens=False, window=case.window())
    expected, plain = case.logits(), _gradients(case, prefix)
    torch._dynamo.reset()
    uncompiled, eager = case.model, torch._dynamo.lookup_backend("aot_eager")
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return eager(graph, inputs)

    case.model = torch.compile(case.model, backend=counting)  # type: ignore[assignment]
    with _without_cache(uncompiled):
        worst = difference(case.logits(), expected)
        again = _gradients(case, prefix)
    if len(graphs) < 2:  # without gradients, and with them
        return float("inf")
    return max(worst, *(difference(again[n], g) / float(g.abs().max()) for n, g in plain.items()))


@contextmanager
def _without_cache(model: Any) -> Any:
    before = getattr(model.config, "use_cache", None)
    if before is not None:
        model.config.use_cache = False
    yield
    if before is not None:
        model.config.use_cache = before


def half_precision(family: str) -> float:
    """Logits in bf16 and fp16 against float32, relative to the largest; the table stays float32."""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(family)
        prefix = case.attach(window=case.window())
        expected = case.logits()
        flat = prefix.encoder.flat().detach().clone()
        case.model.to(dtype)
        prefix.float()
        prefix.encoder.load_flat(flat)
        logits = case.logits()
        if {p.dtype for p in prefix.parameters()} != {torch.float32} or logits.dtype != dtype:
            return float("inf")
        worst = max(worst, difference(logits, expected) / float(expected.abs().max()))
    return worst


def four_bit(family: str) -> float | None:
    """On an NF4 base: from real tokens against these tokens."""
    case = Case(family)
    if case.kind != "decoder":
        return None
    kinds = {type(m) for m in case.model.modules() if type(m).__name__ == "FalconLinear"}
    mp.quantize_model(case.model, also=tuple(kinds))
    whole = torch.cat([case.prompt.expand(2, -1), case.text], 1)
    with torch.no_grad():
        expected = case.model(whole).logits[:, P:]
    case.attach(window=case.window())
    return difference(case.logits(), expected)


def with_lora(family: str) -> float:
    """LoRA attached before and after against each other; both get gradients."""
    logits = []
    for first in ("lora", "prefix"):
        case = Case(family)
        if first == "prefix":
            prefix = case.attach(window=case.window())
        torch.manual_seed(7)
        random_lora(case.model)
        if first == "lora":
            with mp.disable_adapters(case.model):
                prefix = case.attach(window=case.window())  # its tokens run without LoRA
        logits.append(case.logits())
        case.model(**case.inputs()).logits.square().mean().backward()
        owned = named_tensors("", case.model, None)[0]
        if not all(p.grad is not None and p.grad.abs().max() > 0 for p in owned.values()):
            return float("inf")
        del prefix
    return difference(*logits)


@torch.no_grad()
def mixed_rows(family: str) -> float:
    """Rows with prefixes of lengths 5, 3, none and both against each row's own run."""
    case = Case(family)
    prefix = case.attach(window=case.window())
    mp.attach_prefix(case.model, 3, name="other", init_std=0.5, train_head=False)
    text = torch.cat([case.text, case.text.flip(1)])
    target = torch.cat([case.target, case.target])
    rows = ["default", "other", None, ["default", "other"]]
    extra = {"decoder_input_ids": target} if case.kind == "encoder-decoder" else {}

    def run(ids: Tensor, keep: slice) -> Tensor:
        logits: Tensor = case.model(ids, **{k: v[keep] for k, v in extra.items()}).logits
        return logits

    mp.use_adapters(case.model, rows=rows)
    together = run(text, slice(None))
    worst = 0.0
    for i, row in enumerate(rows):
        own = [] if row is None else [row] if isinstance(row, str) else row
        for name, encoder in prefix.encoders.items():
            encoder.enabled = name in own
        prefix.stop_rows()
        alone = run(text[i : i + 1], slice(i, i + 1))
        worst = max(worst, difference(together[i : i + 1], alone))
        prefix.serve_rows([(r,) if isinstance(r, str) else tuple(r or ()) for r in rows])
    return worst


@torch.no_grad()
def switched_off(family: str) -> float:
    """Switched off, and removed, against the model before: 0.0, or not equal bit for bit."""
    case = Case(family)
    before = case.logits()
    prefix = case.attach(window=case.window())
    on = case.logits()
    with mp.disable_adapters(case.model):
        off = case.logits()
    prefix.enabled = False
    none = case.logits()
    prefix.enabled = True
    again = case.logits()
    prefix.remove()
    equal = [torch.equal(x, before) for x in (off, none, case.logits())]
    if not torch.equal(on, again) or torch.equal(on, before):
        return float("inf")
    return 0.0 if all(equal) else difference(off, before)


@torch.no_grad()
def gated(family: str) -> float:
    """A gated prefix as it starts against no prefix."""
    case = Case(family)
    before = case.logits()
    case.attach(tokens=False, gated=True)
    return difference(case.logits(), before)


def copied(family: str) -> float:
    """A deepcopy of the model against the model, after the model's prefix has changed."""
    case = Case(family)
    prefix = case.attach(tokens=False, window=case.window())
    before, twin = case.logits(), copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(1.0)
    case.logits()
    case.model = twin
    return difference(case.logits(), before)


BEHAVIOURS: dict[str, Callable[[str], float | None]] = {
    "as tokens": as_tokens, "padded": padded, "window": seen_from_everywhere,
    "generate": generated, "static cache": static_cache, "own cache": own_cache,
    "embeddings": given_embeddings, "checkpointed": checkpointed, "compiled": compiled,
    "bf16, fp16": half_precision, "NF4": four_bit, "with LoRA": with_lora, "rows": mixed_rows,
    "off": switched_off, "gated": gated, "copy": copied,
}  # fmt: skip
