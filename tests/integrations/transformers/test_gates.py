"""Gates where a prefix enters through the cache: against loops in float64, and what must keep."""

import copy
import math
import sys
import types

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
from benchmarks.models import enable_checkpointing
from minipeft.integrations.transformers import positions
from minipeft.io import prefixes
from tests.prefix_behaviours import GREEDY, Case, difference, random_lora

TOLERANCE = 1e-5  # float32, logits around 1, summed in another order
ALIBI = ("BLOOM", "MPT", "Falcon, ALiBi")
FAMILIES = [*ALIBI, "Falcon, 7B kind", "Falcon, 40B kind", "GPT-J", "CodeGen"]
T, P = 6, 3


def gated(case, name="default", seed=0, length=P):
    """A gated prefix with a gate of its own for each layer and head."""
    prefix = mp.attach_prefix(case.model, length, name=name, gated=True, train_head=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prefix.encoders[name].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return prefix


def decoder_of(model):
    """The transformer without its head."""
    return getattr(model, model.base_model_prefix)


def padded(side):
    """Two texts, the second of which is shorter by two tokens."""
    ids = torch.randint(3, 97, (2, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if side is not None:
        mask[1, slice(0, 2) if side == "left" else slice(T - 2, T)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


# --- the reference: one query after the other, one head after the other ---


def projected(family, module, x):
    """Queries, keys and values (heads, tokens, dim) of one row, as the class lays them out."""
    if family == "MPT":
        return [t.view(len(x), 4, 8).transpose(0, 1) for t in module.Wqkv(x).chunk(3, -1)]
    fused = module.query_key_value(x)
    if family == "Falcon, 7B kind":  # one key and value for all heads
        parts = fused.view(len(x), 6, 8).transpose(0, 1)
        return [parts[:4], parts[4:5].expand(4, -1, -1), parts[5:].expand(4, -1, -1)]
    if family == "Falcon, 40B kind":  # two queries, then their key and value
        groups = fused.view(len(x), 2, 4, 8).permute(1, 2, 0, 3)
        return [
            groups[:, :2].flatten(0, 1),
            *(groups[:, i].repeat_interleave(2, 0) for i in (2, 3)),
        ]
    return list(fused.view(len(x), 4, 3, 8).permute(2, 1, 0, 3))


def rotated(x, numbers):
    """Rotary embedding: x_i and x_(i + 4) turn by number / 10000^(i / 4)."""
    angles = numbers[:, None] / 10000 ** (torch.arange(4, dtype=x.dtype) / 4)
    one, two = x[..., :4], x[..., 4:]
    return torch.cat([one * angles.cos() - two * angles.sin(),
                      two * angles.cos() + one * angles.sin()], -1)  # fmt: skip


def attended(family, q, k, v, distances, head):
    """softmax of scores, biased by distance, over values; one query."""
    scores = k @ q / math.sqrt(8)
    if family in ALIBI:
        slope = 2.0 ** (-2 * (head + 1))  # 4 heads: 2^-2, 2^-4, ...
        scores = scores - distances * slope / (math.sqrt(8) if "Falcon" in family else 1)
    return torch.softmax(scores, 0) @ v


def reference(family, case, layers, mask):
    """A copy of the model whose attention is loops; `layers` has (k, v, gate) for each prefix."""
    model = copy.deepcopy(case.model).double()
    kind = {"BLOOM": "BloomAttention", "MPT": "MptAttention"}.get(family, "FalconAttention")
    modules = [m for m in model.modules() if type(m).__name__ == kind]
    for module, parts in zip(modules, layers, strict=True):
        plain = [(k, v) for k, v, gate in parts if gate is None]

        def heads_of(self, x, parts=parts, plain=plain):
            """What the heads of one row give for its tokens, (tokens, heads * dim)."""
            moved = sum(k.shape[1] for k, _ in plain)
            q, k, v = projected(family, self, x)
            numbers = torch.arange(len(x), dtype=x.dtype)
            if family not in ALIBI:
                q, k = rotated(q, numbers + moved), rotated(k, numbers + moved)
            made = []
            for t in range(len(x)):
                for h in range(4):
                    g = h if len(parts[0][0]) == 4 else 0
                    keys = torch.cat([*(pk[g] for pk, _ in plain), k[h, : t + 1]])
                    values = torch.cat([*(pv[g] for _, pv in plain), v[h, : t + 1]])
                    near = t + moved - torch.arange(len(keys), dtype=x.dtype)
                    alone = attended(family, q[h, t], keys, values, near, h)
                    y = alone
                    for pk, pv, gate in parts:
                        if gate is not None:  # it stands before the others
                            far = t + moved + torch.arange(pk.shape[1], 0, -1)
                            whole = attended(
                                family, q[h, t], torch.cat([pk[g], keys]),
                                torch.cat([pv[g], values]), torch.cat([far, near]), h,
                            )  # fmt: skip
                            y = y + gate[g] * (whole - alone)
                    made.append(y)
            return torch.stack(made).view(len(x), -1)

        def forward(self, hidden_states, residual=None, *, heads_of=heads_of, **_):
            rows = []
            for row, x in enumerate(hidden_states):
                real = mask[row].nonzero()[:, 0]
                rows.append(torch.zeros_like(x).index_copy(0, real, heads_of(self, x[real])))
            out = (self.out_proj if family == "MPT" else self.dense)(torch.stack(rows))
            return (out if residual is None else out + residual), None

        module.forward = types.MethodType(forward, module)
    return model


def of_layers(prefix):
    """Keys, values and gates (None: without) of each layer in float64, for each prefix."""
    return [
        [
            tuple(None if t is None else t.double() for t in (*e.layer(n), e.gate(n)))
            for e in prefix.encoders.values()
        ]
        for n in range(len(prefix.kv_shapes))
    ]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES[:5])
def test_gated_heads_and_their_gradients_are_those_of_loops(family, side):
    case, inputs = Case(family), padded(side)
    prefix = gated(case)
    if family not in ALIBI:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        gated(case, name="second", seed=1, length=2)
    mp.attach_prefix(case.model, 2, name="plain", init_std=1.0, train_head=False)
    mp.use_adapters(case.model, list(prefix.encoders))
    real = inputs["attention_mask"].bool()
    weight = torch.randn(97, generator=torch.Generator().manual_seed(4))

    def measured(model):
        logits = model(**inputs, use_cache=False).logits[real]
        loss = (logits.softmax(-1) @ weight.to(logits.dtype)).square().sum()
        return logits.detach(), torch.autograd.grad(loss, list(prefix.parameters()))

    found, gradients = measured(case.model)
    alone = Case(family)
    expected, wanted = measured(
        reference(family, alone, of_layers(prefix), inputs["attention_mask"])
    )
    assert difference(found, expected) <= TOLERANCE
    for one, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 0
        # a gradient sums over 100 logits and back: ten times that, of its largest entry
        assert difference(one, other) <= 10 * TOLERANCE * float(other.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_change_nothing_also_with_dropout_and_beside_another_prefix(family):
    case = Case(family)
    for module in case.model.modules():
        for name in ("attn_dropout_p", "hidden_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.3)
        if isinstance(module, nn.Dropout):
            module.p = 0.3

    case.model.config.hidden_dropout = 0.3

    def both():
        torch.manual_seed(11)
        with torch.no_grad():
            trained = case.model.train()(case.text).logits
        case.model.eval()
        return case.logits(), trained

    before = both()
    mp.attach_prefix(case.model, 3, name="plain", init_std=1.0)
    with_plain = both()
    mp.attach_prefix(case.model, 4, name="gated", gated=True, init_std=1.0)
    mp.use_adapters(case.model, "gated")
    assert all(difference(*pair) <= TOLERANCE for pair in zip(both(), before, strict=True))
    mp.use_adapters(case.model, ["gated", "plain"])
    assert all(difference(*pair) <= TOLERANCE for pair in zip(both(), with_plain, strict=True))
    if family in ALIBI:
        with pytest.raises(ValueError, match="a gated prefix beside others needs a 2-D mask"):
            case.logits(attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
    assert difference(before[0], before[1]) > 0.1


@pytest.mark.parametrize("family", [*FAMILIES, "LLaMA", "BERT"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_outside(family, side):
    """Learned positions are the model's: BERT's move with padding on the left."""
    if (family, side) == ("BERT", "left"):
        pytest.skip("without a prefix too")
    case, inputs = Case(family), padded(side)
    gated(case)
    real = inputs["attention_mask"][1].bool()
    alone = case.logits(text=inputs["input_ids"][1:, real])
    found = case.logits(text=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert difference(found[1:, real], alone) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_model_sees_of_positions_is_found_in_every_dtype(dtype):
    """In 16 bits rotary attention rounds; a trained table has neighbours that are nearly equal."""
    for family in ("LLaMA", "GPT-J"):
        assert positions.only_distance(decoder_of(Case(family).model).to(dtype))
    model = decoder_of(Case("GPT-2").model)
    assert not positions.only_distance(model.to(dtype))
    table, angle = model.wpe.weight, torch.linspace(0, 2, len(model.wpe.weight))[:, None]
    with torch.no_grad():
        drawn = torch.randn(2, table.shape[1])
        table.copy_(drawn[0] * angle.cos() + drawn[1] * angle.sin())
    assert not positions.only_distance(model)


def test_closed_gates_change_nothing_in_bfloat16_under_padding():
    case = Case("GPT-2")
    model, ids = case.model.bfloat16(), torch.randint(3, 97, (1, 24))
    mask = (torch.arange(24) >= 16)[None].long()
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        mp.attach_prefix(model, P, gated=True)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("family", ["BLOOM", "GPT-J", "Falcon, 7B kind"])
def test_a_hook_on_attention_acts_in_every_run_whenever_it_came(family):
    case = Case(family)
    prefix = gated(case)
    attention = prefix.hooks.gates[0].place.module

    def change(module, args, kwargs):
        name = "hidden_states"
        if name in kwargs:
            return args, {**kwargs, name: kwargs[name] + 1}
        return (args[0] + 1, *args[1:]), kwargs

    found = []
    for first in (True, False):
        handle = attention.register_forward_pre_hook(change, prepend=first, with_kwargs=True)
        found.append(case.logits())
        handle.remove()
    assert torch.equal(*found)
    assert difference(found[0], case.logits()) > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, "LLaMA"])
def test_generation_rows_and_checkpointing(family):
    case = Case(family)
    prefix = gated(case)
    if family in ALIBI:
        with pytest.raises(ValueError, match="a second gated prefix would move 'default'"):
            mp.attach_prefix(case.model, 2, name="other", gated=True)
        mp.attach_prefix(case.model, 2, name="other", init_std=1.0)
    else:
        gated(case, name="other", seed=1, length=2)
    mp.use_adapters(case.model, rows=["default", "other"])
    together = case.logits()
    for row, name in enumerate(("default", "other")):
        mp.use_adapters(case.model, name)
        alone = case.model(case.text[row : row + 1]).logits
        assert difference(alone, together[row : row + 1]) <= TOLERANCE
    mp.use_adapters(case.model, ["default", "other"])
    mask = torch.ones_like(case.text)
    mask[0, :3] = 0
    settings = GREEDY | {"attention_mask": mask}
    expected = case.model.generate(case.text, **settings, use_cache=False)
    assert torch.equal(case.model.generate(case.text, **settings), expected)
    # MPT, and Falcon with ALiBi, take no static cache without a prefix either
    own = family not in ("MPT", "Falcon, ALiBi")
    static = {"cache_implementation": "static"} if own else {}
    assert torch.equal(case.model.generate(case.text, **settings, **static), expected)
    beams = [
        case.model.generate(case.text, **settings, num_beams=3, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*beams)
    case.model.config.use_cache = False

    def gradients():
        case.model.zero_grad()
        case.model.train()(case.text, attention_mask=mask).logits.square().mean().backward()
        return [p.grad.clone() for p in prefix.parameters()]

    plain = gradients()
    for reentrant in (False, True):
        enable_checkpointing(case.model, reentrant=reentrant)
        for one, other in zip(gradients(), plain, strict=True):
            assert difference(one, other) <= TOLERANCE * float(other.abs().max())


@pytest.mark.parametrize("family", ["BLOOM", "MPT"])
def test_lora_around_the_projection_copies_and_files(family, tmp_path):
    logits = []
    for first in ("lora", "prefix"):
        case = Case(family)
        if first == "prefix":
            gated(case)
        torch.manual_seed(7)
        random_lora(case.model)
        if first == "lora":
            gated(case)
        logits.append(case.logits())
    assert difference(*logits) <= TOLERANCE
    twin = copy.deepcopy(case.model)
    case.model.minipeft_prefix.remove()
    with torch.no_grad():
        assert difference(twin(case.text).logits, logits[1]) <= TOLERANCE
    bare = Case(family)
    prefix = gated(bare)
    expected = bare.logits()
    prefixes.save_prefix(bare.model, tmp_path)
    random_lora(bare.model)
    for module in bare.model.modules():
        if isinstance(module, mp.LoRALinear):
            module.enabled = False
    assert difference(bare.logits(), expected) <= TOLERANCE
    again = Case(family)
    prefixes.load_prefix(again.model, tmp_path)
    assert difference(again.logits(), expected) <= TOLERANCE
    prefix.remove()
    assert not any(m._forward_pre_hooks for m in bare.model.modules())


def test_an_error_while_lora_comes_leaves_the_projection_hooked_once(monkeypatch):
    case = Case("BLOOM")
    gated(case)
    expected = case.logits()

    def fail(model):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["minipeft.inject"], "after_freeze", [fail])
        with pytest.raises(MemoryError):
            mp.inject_lora(case.model, "all-linear", 2)
    assert torch.equal(case.logits(), expected)
    case.model.minipeft_prefix.remove()
    assert not any(m._forward_pre_hooks for m in case.model.modules())


def test_an_error_in_a_run_leaves_nothing_for_the_next():
    case = Case("BLOOM")
    prefix = gated(case)
    expected = case.logits()
    module = prefix.hooks.gates[1].place.module

    def fail(*_):
        raise MemoryError("no room")

    handle = module.query_key_value.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        case.logits()
    handle.remove()
    with mp.disable_adapters(case.model):
        plain = case.logits()
    assert torch.equal(plain, Case("BLOOM").logits()) and torch.equal(case.logits(), expected)


def bent(self, x):
    """Heads side by side, bent: no longer what values add up to."""
    return type(self)._merge_heads(self, x).tanh()


def beside(self, *args, **kwargs):
    """The heads' outputs a second time, beside the projection."""
    out, weights = type(self).forward(self, *args, **kwargs)
    return out + weights.mean() + self.held, weights


@pytest.mark.parametrize("kind", ["bent", "in slices", "beside"])
def test_attention_whose_heads_cannot_be_blended_is_refused(kind):
    case = Case("BLOOM")
    module = next(m for m in case.model.modules() if type(m).__name__ == "BloomAttention")
    if kind == "bent":
        module._merge_heads = types.MethodType(bent, module)
        message = "is not the heads' outputs side by side"
    elif kind == "in slices":
        module.pretraining_tp, module.slow_but_exact = 2, True
        message = "has no module of its own that projects the heads"
    else:

        def keep(_, args):
            module.held = args[0].sum()

        module.dense.register_forward_pre_hook(keep)
        module.forward = types.MethodType(beside, module)
        message = "uses the heads' outputs beside dense too"
    before = case.logits()
    with pytest.raises(ValueError, match=f"{message}.*without gated=True"):
        mp.attach_prefix(case.model, P, gated=True)
    assert torch.equal(case.logits(), before)
    mp.attach_prefix(case.model, P)
    with pytest.raises(ValueError, match=message):
        mp.attach_prefix(case.model, P, gated=True, name="gated")
    assert list(case.model.minipeft_prefix.encoders) == ["default"]
