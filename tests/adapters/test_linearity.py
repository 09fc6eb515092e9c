"""Folding and 4-bit layers only where forward is the formula: each module is tried, not known."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import minipeft as mp
from minipeft.adapters.linearity import why_not_foldable, why_not_formula, why_not_replaceable


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class ByHand(nn.Linear):  # as transformers' FalconLinear
    def forward(self, x):
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    def __init__(self, *sizes, factor=1.0):
        super().__init__(*sizes)
        self.factor = factor

    def forward(self, x):
        return F.linear(x, self.weight * self.factor, self.bias)


class Normalised(nn.Linear):
    def forward(self, x):
        return super().forward(x / x.norm(dim=-1, keepdim=True))


class ClippedInput(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-6, 6))


class ClippedWeight(nn.Linear):  # this weight is within the bounds, another may not be
    def forward(self, x):
        return F.linear(x, self.weight.clamp(-3, 3), self.bias)


class ClippedInPlace(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-3, 3)
        return super().forward(x)


class Masked(nn.Linear):  # as the mask already holds of the weight, x W^T + b is what it computes
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())
        self.weight.data *= self.mask

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Int8Input(nn.Linear):
    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward((x / step).round() * step)


class HalfInside(nn.Linear):
    def forward(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x.dtype)


class Float32Inside(nn.Linear):
    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class DeadZone(nn.Linear):
    def forward(self, x):
        # a linear layer but for inputs this small, which a probe of ordinary size misses
        return super().forward(torch.where(x.abs() < 1e-3, 0.0, x))


class Cached(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.cache = self.weight.detach().clone()

    def forward(self, x):
        return F.linear(x, self.cache.to(x.dtype), self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(self.out_features, dtype=x.dtype)


class TwoArguments(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class TupleOut(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class OwnCall(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Property(nn.Linear):  # reads another tensor than the parameter
    weight = property(lambda self: 2 * self._parameters["weight"])


def shadowed():
    layer = nn.Linear(6, 5)
    layer.__class__ = Property
    return layer


class Transposed(nn.Module):  # of the same shape if it is square
    def __init__(self, size=6):
        super().__init__()
        self.in_features = self.out_features = size
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x):
        return x @ self.weight


class OnlyThreeAxes(nn.Linear):
    def forward(self, x):
        batch, tokens, _ = x.shape
        return super().forward(x).view(batch, tokens, self.out_features)


class OnlyTwoAxes(nn.Linear):
    def forward(self, x):
        return torch.mm(x, self.weight.T) + self.bias


DIFFERENT = {
    "doubled": lambda: Doubled(6, 6), "scaled": lambda: Scaled(6, 5, factor=2.0),
    "normalised": lambda: Normalised(6, 5), "clipped input": lambda: ClippedInput(6, 5),
    "clipped weight": lambda: ClippedWeight(6, 5), "in place": lambda: ClippedInPlace(6, 5),
    "masked": lambda: Masked(6, 5), "int8 input": lambda: Int8Input(6, 5),
    "16 bits inside": lambda: HalfInside(6, 5), "dead zone": lambda: DeadZone(6, 5),
    "cached": lambda: Cached(6, 5), "noisy": lambda: Noisy(6, 5),
    "two arguments": lambda: TwoArguments(6, 5), "tuple": lambda: TupleOut(6, 5),
    "own call": lambda: OwnCall(6, 5), "property": shadowed,
    "transposed": Transposed,
}  # fmt: skip
SAME = {
    "plain": lambda: nn.Linear(6, 5), "by hand": lambda: ByHand(6, 5),
    "without bias": lambda: ByHand(6, 5, bias=False), "factor 1": lambda: Scaled(6, 5),
    "float32 inside": lambda: Float32Inside(6, 5), "one output": lambda: ByHand(7, 1),
    "three axes": lambda: OnlyThreeAxes(6, 5), "two axes": lambda: OnlyTwoAxes(6, 5),
    "bfloat16": lambda: ByHand(6, 5).bfloat16(), "large": lambda: ByHand(257, 300),
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_is_wrapped_but_never_folded(kind):
    """x W^T + b is not what it computes, for every weight; LoRA calls it, so LoRA is right."""
    base = DIFFERENT[kind]()
    assert why_not_foldable(base) is not None
    model = nn.Sequential(base).eval()
    mp.inject_lora(model, ["0"], 2, init=lambda layer: nn.init.ones_(layer.lora_b))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for fold in (mp.merge, lambda m: mp.remove(m, merge=True)):
        with pytest.raises(ValueError, match=rf"0: {type(base).__name__} .*\(?.*cannot be folded"):
            fold(model)
        assert isinstance(model[0], mp.LoRALinear) and model[0].merged_module is None
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="leave it unmerged"):
        model[0].merged()


@pytest.mark.parametrize("kind", SAME)
def test_what_computes_the_formula_is_folded(kind):
    base = SAME[kind]()
    assert why_not_foldable(base) is None and why_not_replaceable(base) is None
    model = nn.Sequential(base).eval()
    mp.inject_lora(model, ["0"], 1, init=lambda layer: nn.init.ones_(layer.lora_b))
    x = torch.randn(3, base.in_features, dtype=base.weight.dtype)
    x = x if kind == "two axes" else x[None]
    expected = model(x)
    mp.merge(model)
    tolerance = 3e-2 if base.weight.dtype == torch.bfloat16 else 1e-4  # bf16: rounded once more
    # measured 2e-3 in bfloat16, 4e-7 in float32 (values up to 2)
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


def test_two_instances_of_one_class_can_differ():
    model = nn.Sequential(Scaled(6, 6), Scaled(6, 6, factor=0.5)).eval()
    mp.inject_lora(model, ["0", "1"], 2)
    with pytest.raises(ValueError, match="1: Scaled has a forward of its own"):
        mp.merge(model)
    assert model[0].merged_module is None
    mp.remove(model, name="default")
    mp.inject_lora(model, ["0"], 2)
    assert mp.merge(model) == ["0"]


def test_from_linear_tries_the_layer():
    assert isinstance(mp.NF4Linear.from_linear(ByHand(64, 4)), mp.NF4Linear)
    with pytest.raises(ValueError, match=r"Doubled has a forward of its own.*also="):
        mp.NF4Linear.from_linear(Doubled(64, 4))
    layer = nn.Linear(64, 4)
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="replaced on the instance"):
        mp.NF4Linear.from_linear(layer)


@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_hooks_that_change_what_is_computed_count_when_folding(hook):
    def register(layer):
        if hook == "forward":
            return layer.register_forward_hook(lambda module, args, out: 2 * out)
        return layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    for base in (nn.Linear(64, 8), mp.NF4Linear.from_linear(nn.Linear(64, 8))):
        model = nn.Sequential(base).eval()
        mp.inject_lora(model, ["0"], 2)
        handle = register(base)
        with pytest.raises(ValueError, match="has hooks, with which it is not x W"):
            mp.merge(model)
        with pytest.raises(ValueError, match="has hooks"):
            mp.remove(model, merge=True)
        handle.remove()
        assert mp.merge(model) == ["0"]


def test_hooks_that_only_look_do_not_and_go_on_looking():
    seen = []

    class Holder(nn.Module):
        """Its hook is a method of what holds the model: nothing of it may be copied."""

        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(64, 8), nn.Linear(64, 8)
            self.layer.register_forward_hook(self.look)

        def look(self, module, args, out):
            seen.append((self, tuple(out.shape)))

        def forward(self, x):
            return self.layer(x)

    for quantized in (False, True):
        model = Holder().eval()
        inject = mp.inject_qlora if quantized else mp.inject_lora
        inject(model, ["layer"], 2)
        mp.merge(model)
        seen.clear()
        model(torch.randn(3, 64))
        assert len(seen) == 1 and seen[0][0] is model and seen[0][1] == (3, 8)


def test_hooks_move_along_when_a_layer_is_quantised():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert mp.quantize_model(model) == ["0", "2"]
    x = torch.randn(3, 64)
    assert torch.equal(model[0](x), 2 * mp.NF4Linear.forward(model[0], x))


def test_a_forward_on_the_instance_is_followed_where_it_can_be():
    """As accelerate's: a partial with the module.  A closure would go on with the old weight."""

    def through(module, x):
        return module.old_forward(x)

    for base, foldable in ((nn.Linear(6, 5), True), (nn.Linear(6, 5), False)):
        plain = base.forward
        base.old_forward = plain
        base.forward = functools.partial(through, base) if foldable else (lambda x, f=plain: f(x))
        reason = why_not_foldable(base)
        assert (reason is None) == foldable, reason
        if not foldable:
            assert "replaced on the instance" in reason
        model = nn.Sequential(base).eval()
        mp.inject_lora(model, ["0"], 2, init=lambda layer: nn.init.ones_(layer.lora_b))
        x = torch.randn(4, 6)
        expected = model(x)
        if foldable:
            mp.merge(model)
            # float32: the product is rounded into the weight, measured 2e-7
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="replaced on the instance"):
                mp.merge(model)


def test_a_torch_class_whose_forward_somebody_replaced_is_tried(monkeypatch):
    plain = nn.Linear.forward
    assert why_not_formula(nn.Linear(6, 5)) is None
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    assert "is not x W^T + b" in why_not_formula(nn.Linear(6, 5))


def test_a_plain_layer_is_not_run():
    """Merging a large model costs no trial: a class with torch's own forward is its code."""
    with torch.device("meta"):
        layers = [
            nn.Linear(10**6, 10**6), nn.Embedding(10**7, 10**5), nn.Conv2d(10**4, 10**4, 9),
            nn.MultiheadAttention(10**5, 10),
        ]  # fmt: skip
    assert [why_not_foldable(layer) for layer in layers] == [None] * 4


def test_the_trial_touches_nothing():
    class Counting(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.calls, self.log = 0, []
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.log.append(self.training)
            self.mean += x.mean()
            return x @ self.weight.T + self.bias

    layer = Counting(6, 5).train()
    before = copy.deepcopy(layer.state_dict())
    assert why_not_foldable(layer) is None
    assert (layer.calls, layer.log, layer.training) == (0, [], True)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert layer.weight.requires_grad
    noisy, state = Noisy(6, 5), torch.get_rng_state()
    assert why_not_foldable(noisy) is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_meta_layers_are_tried_with_numbers_of_the_trials_own():
    with torch.device("meta"):
        same, other, masked = ByHand(64, 8), Doubled(64, 8), Masked(64, 8)
    assert why_not_replaceable(same) is None
    assert "is not x W^T + b" in why_not_replaceable(other)
    assert "is not x W^T + b" in why_not_replaceable(masked)


def test_autocast_does_not_reach_into_the_trial():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_not_foldable(ByHand(6, 5)) is None


def test_weights_that_are_no_floats_are_refused_by_name():
    class Int8(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 5
            self.weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)
            self.bias = None

        def forward(self, x):
            return x @ self.weight.T.to(x.dtype)

    model = nn.Sequential(Int8()).eval()
    mp.inject_lora(model, ["0"], 2)
    model(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"0: the weight of this Int8 is torch.int8"):
        mp.merge(model)
    assert model[0].weight.dtype == torch.int8, "models look at the dtype"
    with pytest.raises(ValueError, match=r"the weight of this Int8 is torch\.int8"):
        mp.layers.DoRALinear(Int8(), 2)


def test_a_tensor_of_another_class_is_no_plain_weight():
    class Codes(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    layer = nn.Linear(6, 5)
    layer.weight = nn.Parameter(torch.randn(5, 6).as_subclass(Codes))
    assert "Codes, no plain tensor" in why_not_foldable(layer)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_bitsandbytes_eight_bit_layers_are_wrapped_and_refused_when_folding():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")
    model = nn.Sequential(base).eval()
    mp.inject_lora(model, ["0"], 2, init=lambda layer: nn.init.ones_(layer.lora_b))
    x = torch.randn(3, 64)
    with_adapter = model(x)
    with mp.disable_adapters(model):
        assert (model(x) - with_adapter).abs().max() > 0.1
    for fold in (mp.merge, lambda m: mp.remove(m, merge=True)):
        with pytest.raises(ValueError, match=r"0: the weight of this Linear8bitLt is torch.int8"):
            fold(model)
    # nothing was folded: measured 0
    torch.testing.assert_close(model(x), with_adapter, rtol=1e-5, atol=1e-5)


# other kinds


class Offset(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 1) % self.num_embeddings)


class TimesScale(nn.Embedding):
    def __init__(self, *sizes, scale=3.0, tensor=False):
        super().__init__(*sizes)
        if tensor:
            self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)
        else:
            self.embed_scale = scale

    def forward(self, ids):
        scale = self.embed_scale
        scale = scale.to(self.weight.dtype) if isinstance(scale, torch.Tensor) else scale
        return super().forward(ids) * scale


class ScaleUnused(nn.Embedding):  # the attribute alone says nothing
    embed_scale = 3.0


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_table_times_its_scale(tensor, device):
    with torch.device(device):
        table = TimesScale(11, 64, tensor=tensor)
    assert why_not_foldable(table) is None
    assert "rows of its table (off by" in why_not_replaceable(table), "4-bit tables do not scale"
    layer = mp.layers.LoRAEmbedding(table, 2)
    if device == "cpu":
        nn.init.normal_(layer.lora_a)
        ids = torch.tensor([[0, 3, 10]])
        # float32, values up to 21: measured 2e-6
        torch.testing.assert_close(layer.merged()(ids), layer(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Offset, ScaleUnused])
def test_other_tables_are_refused(kind):
    with pytest.raises(ValueError, match="the rows of its table"):
        mp.layers.LoRAEmbedding(kind(11, 4), 2)
    assert kind is ScaleUnused or "forward of its own" in why_not_replaceable(kind(11, 64))


def test_a_convolution_with_a_forward_of_its_own_may_be_torchs():
    class Own(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                            self.groups)  # fmt: skip

    class Same(nn.Conv2d):  # pads by itself
        def forward(self, x):
            return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.std(), bias)

    layer = mp.layers.LoRAConv(Own(4, 6, 3, padding=1, stride=2, groups=2), 2)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 4, 9, 9)
    # float32: the product is rounded into the weight, measured 2e-7
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-5, atol=1e-5)
    for kind in (Same, Standardised):
        with pytest.raises(ValueError, match="torch's convolution with its settings"):
            mp.layers.LoRAConv(kind(4, 6, 3), 2)
    for mode in ("reflect", "circular", "replicate"):
        assert why_not_formula(Own(4, 6, 3, padding=2, padding_mode=mode)) is not None
        hooked = nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode=mode, dilation=2)
        hooked.register_forward_hook(lambda *args: None)
        assert why_not_foldable(hooked) is None


def test_hooks_on_attention_count():
    attention = nn.MultiheadAttention(8, 2)
    attention.register_forward_hook(lambda module, args, out: (2 * out[0], out[1]))
    layer = mp.layers.LoRAMultiheadAttention(attention, 2)
    with pytest.raises(ValueError, match=r"nn\.MultiheadAttention's"):
        layer.merged()


def test_a_trained_bias_is_folded_where_the_bias_is_added():
    class RMS(nn.Module):
        def __init__(self, factor=1.0):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
            self.factor = factor

        def forward(self, x):
            out = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * self.weight
            return out + self.factor * self.bias

    for norm in (RMS(), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6)):
        model = nn.Sequential(norm).eval()
        mp.train_biases(model, "all")
        nn.init.normal_(model[0].bias_delta)
        x = torch.randn(5, 6)
        expected = model(x)
        mp.merge(model)
        # float32, values up to 4: measured 2e-7
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for other in (RMS(2.0), Doubled(6, 6)):
        model = nn.Sequential(other).eval()
        mp.train_biases(model, "all")
        with pytest.raises(ValueError, match=type(other).__name__):
            mp.merge(model)


def test_a_module_trained_whole_needs_no_formula():
    model = nn.Sequential(Doubled(6, 6)).eval()
    mp.train_modules(model, ["0"])
    nn.init.normal_(model[0].copy.weight)
    x = torch.randn(5, 6)
    expected = model(x)
    mp.merge(model)
    # the same module computes: not a bit differs
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    mp.remove(model, merge=True)
    assert type(model[0]) is Doubled
    # the same
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["doubled", "scaled", "int8 input", "masked", "normalised"])
def test_dora_refuses_what_does_not_compute_with_the_weight_it_shows(kind):
    with pytest.raises(ValueError, match=r"DoRALinear: .*use LoRA"):
        mp.layers.DoRALinear(DIFFERENT[kind](), 2)


def test_dora_takes_a_computed_weight_that_is_what_it_multiplies_by():
    base = parametrizations.weight_norm(nn.Linear(6, 5))
    layer, x = mp.layers.DoRALinear(base, 2), torch.randn(3, 6)
    # float32, B = 0: the weight is multiplied by 1; measured 0
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)


def test_pruned_layers_are_refused():
    layer = nn.Linear(6, 5)
    prune.l1_unstructured(layer, "weight", 0.5)
    model = nn.Sequential(layer).eval()
    mp.inject_lora(model, ["0"], 2)
    with pytest.raises(ValueError, match="computes its weight"):
        mp.merge(model)
    prune.remove(layer, "weight")
    assert mp.merge(model) == ["0"]


# quantising a model


def test_quantize_model_leaves_dense_what_differs_and_takes_what_does_not():
    model = nn.ModuleDict(
        {"same": ByHand(64, 64), "other": Doubled(64, 64), "plain": nn.Linear(64, 64)}
    )
    with pytest.warns(
        UserWarning, match=r"left other dense: Doubled has a forward of its own.*also="
    ):
        names = mp.quantize_model(model)
    assert names == ["same", "plain"]
    assert "is not x W^T + b" in names.left_out["other"]
    assert mp.quantize_model(model, also=(Doubled,)) == ["other"], "the caller vouches"


def falcon():
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.FalconForCausalLM(config).eval()


def test_falcons_own_linear_layers_are_folded_and_quantised():
    model, rows = falcon(), torch.randint(50, (2, 7))
    kind = type(model.transformer.h[0].mlp.dense_h_to_4h)
    assert kind.forward is not nn.Linear.forward
    mp.inject_lora(
        model, "all-linear", 2, init=lambda layer: nn.init.normal_(layer.lora_b, std=0.1)
    )
    expected = model(rows).logits
    mp.merge(model)
    # float32 through two layers, logits up to 0.8: measured 3e-7
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-5)
    mp.remove(model, merge=True)
    # the same
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is kind
    names = mp.quantize_model(model)
    assert len(names) == 8 and "lm_head" in names.left_out
    assert isinstance(model.transformer.h[0].mlp.dense_h_to_4h, mp.NF4Linear)


class WhileTraining(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if self.training else y


class WithScale(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


@pytest.mark.parametrize("kind", [WhileTraining, WithScale])
def test_what_only_eval_or_the_default_argument_shows_is_not_replaced(kind):
    model = nn.Sequential(kind(64, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=f"also=\\({kind.__name__},\\)"):
        names = mp.quantize_model(model, head=())
    assert names == ["1"] and "forward of its own" in names.left_out["0"]


def test_lora_hands_further_arguments_to_the_base():
    layer = mp.LoRALinear(mp.LoRALinear(WithScale(8, 8), rank=2), rank=2)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 8)
    expected = layer.base.base(x, scale=3.0) + x @ layer.lora_a.T @ layer.lora_b.T
    # float32, assert_close's own tolerance: measured 0
    torch.testing.assert_close(layer(x, scale=3.0), expected)
    # the same
    torch.testing.assert_close(layer(x, 3.0), expected)
