"""A batch whose rows use different adapters: each row as if it were alone."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import minipeft as mp
from minipeft import LoRALinear, NF4Linear, ops
from minipeft.adapters.names import named
from minipeft.adapters.protocol import innermost
from minipeft.layers import LoRABank
from minipeft.layers.bank import add_rows

ROWS = ["fr", None, "default", ["fr", "de"], "de", None]


@pytest.fixture(autouse=True)
def _inference():
    """With gradients the layers themselves compute (model/rows/test_training.py)."""
    with torch.no_grad():
        yield


def randomize(model):
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[2] in ("lora_a", "lora_b"):
            nn.init.normal_(parameter, std=0.2)


def base_layer(kind, rows, columns):
    if kind == "Conv1D":
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(columns, rows)
        nn.init.normal_(layer.bias)
        return layer
    linear = nn.Linear(rows, columns)
    return NF4Linear.from_linear(linear) if kind == "NF4" else linear


def make(kind="linear", dtype=torch.float32):
    """Adapters of ranks 3, 5 and 1, one of them over the first layer only."""
    torch.manual_seed(2)
    model = nn.Sequential(base_layer(kind, 64, 65), nn.ReLU(), base_layer(kind, 65, 7)).to(dtype)
    mp.inject_lora(model, ["0", "2"], 3)
    mp.inject_lora(model, ["0"], 5, 15, name="fr")
    mp.inject_lora(model, ["0", "2"], 1, 2, rank_stabilized=True, name="de")
    randomize(model)
    return model.eval()


# relative; float32, the same products in another order, matrices of other sizes: measured 7e-7
ROUNDING = 1e-5


def alone(model, x, row):
    """What one row computes without a bank."""
    if row is None:
        with mp.disable_adapters(model):
            return model(x)
    mp.use_adapters(model, row)
    return model(x)


def one_by_one(model, x, rows):
    model, each = copy.deepcopy(model), len(x) // len(rows)
    mp.use_adapters(model, "default")
    parts = [alone(model, x[i * each : (i + 1) * each], row) for i, row in enumerate(rows)]
    return torch.cat(parts)


def relative(y, expected):
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "NF4"])
@pytest.mark.parametrize("shape", [(6, 64), (6, 1, 64), (6, 7, 64), (6, 2, 3, 64), (18, 64)])
def test_every_row_computes_as_if_alone(kind, shape, capsys):
    model, x = make(kind), torch.randn(shape)
    expected = one_by_one(model, x, ROWS)
    assert sorted(mp.use_adapters(model, rows=ROWS)) == ["0", "2"]
    y = model(x)
    if shape == (6, 7, 64):
        with capsys.disabled():
            print(
                f"\nrows of a mixed batch against each alone, {kind}: {relative(y, expected):.1e}"
            )
    assert relative(y, expected) <= ROUNDING
    different = [relative(y[:1], y[i : i + 1]) for i in range(1, len(y))]
    assert max(different) > 0.01  # the rows do use different adapters


def test_one_layer_equals_a_float64_loop():
    base, x = nn.Linear(63, 7), torch.randn(4, 2, 63, requires_grad=True)
    bank = LoRABank(base, 3, 4).eval()
    factors = [(torch.randn(r, 63), torch.randn(7, r)) for r in (4, 1)]
    for slot, (a, b) in enumerate(factors):
        bank.load(slot, a, b)
    bank.gate = torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 1], [2, -1, 0]])
    with torch.enable_grad():
        y, grad = bank(x), torch.randn(4, 2, 7)
    (dx,) = torch.autograd.grad(y, x, grad)
    for row in range(4):
        weight = base.weight.double()
        for slot, (a, b) in enumerate(factors):
            weight = weight + bank.gate[row, slot].double() * (b.double() @ a.double())
        for token in range(2):
            expected = weight @ x[row, token].double() + base.bias.double()
            # float32 sums of 63 products of numbers around 10
            torch.testing.assert_close(y[row, token].double(), expected, rtol=1e-5, atol=1e-4)
            expected = weight.T @ grad[row, token].double()
            torch.testing.assert_close(dx[row, token].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_are_the_base_bit_for_bit(dtype):
    model, x = make(dtype=dtype), torch.randn(6, 3, 64).to(dtype)
    with mp.disable_adapters(model):
        base = model(x)
    mp.use_adapters(model, rows=ROWS)
    y = model(x)
    assert torch.equal(y[1], base[1])
    assert torch.equal(y[5], base[5])
    assert not torch.equal(y[0], base[0])


def test_one_entry_is_for_batches_of_any_size():
    model = make()
    mp.use_adapters(model, rows=["fr"])
    for shape in ((1, 64), (5, 3, 64), (64,)):
        x = torch.randn(shape)
        twin = copy.deepcopy(model)
        assert relative(model(x), alone(twin, x, "fr")) <= ROUNDING


def test_beams_lie_side_by_side():
    model, x = make(), torch.randn(3, 4, 64)
    beams = x.repeat_interleave(2, dim=0)  # as `generate` expands a batch
    mp.use_adapters(model, rows=["fr", None, "de"])
    assert relative(model(beams), model(x).repeat_interleave(2, dim=0)) <= ROUNDING


def test_another_number_of_rows_raises():
    model = make()
    mp.use_adapters(model, rows=["fr", None, "de"])
    with pytest.raises(ValueError, match=r"shape \(4, 64\) for 3 rows"):
        model(torch.randn(4, 64))
    with pytest.raises(ValueError, match="for 3 rows"):
        model(torch.randn(64))
    mp.use_adapters(model, rows=["fr"] * 4)
    assert model(torch.randn(4, 64)).shape == (4, 7)


def test_other_rows_change_tensors_in_place():
    model, x = make(), torch.randn(6, 64)
    mp.use_adapters(model, rows=ROWS)
    modules = [*model.modules()]
    tensors = [t.data_ptr() for bank in (model[0], model[2]) for t in (bank.a, bank.b, bank.gate)]
    other = [None, "de", ["default", "fr"], "fr", None, "default"]
    expected = one_by_one(model, x, other)
    mp.use_adapters(model, rows=other)
    assert relative(model(x), expected) <= ROUNDING
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert tensors == [
        t.data_ptr() for bank in (model[0], model[2]) for t in (bank.a, bank.b, bank.gate)
    ]


def test_factors_and_scales_are_taken_over_when_rows_are_set():
    model, x = make(), torch.randn(6, 64)
    mp.use_adapters(model, rows=ROWS)
    randomize(model)
    mp.scale_adapters(model, 0.3, name="fr")
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), expected) <= ROUNDING


def test_a_subtracted_start_is_served():
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    mp.inject_lora(model, ["0"], 3, init=mp.starts.pissa())
    nn.init.normal_(model[0].lora_b, std=0.1)
    expected = model(x)
    mp.use_adapters(model, rows=["default", None])
    assert relative(model(x)[:1], expected[:1]) <= ROUNDING
    assert torch.equal(model(x)[1:], innermost(model[0])(x)[1:])


def test_leaving_puts_the_very_stacks_back():
    model, x = make(), torch.randn(6, 64)
    before, keys = [*model], list(model.state_dict())
    mp.use_adapters(model, "fr")
    expected = model(x)
    mp.use_adapters(model, rows=ROWS)
    mp.use_adapters(model, "fr")
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


def test_names_and_state_dicts_see_through_banks():
    model = make()
    names = {name: list(places) for name, places in named(model).items()}
    base, adapter = mp.base_state_dict(model), mp.adapter_state_dict(model, name="fr")
    mp.use_adapters(model, rows=ROWS)
    assert {name: list(places) for name, places in named(model).items()} == names
    for now, then in (
        (mp.base_state_dict(model), base), (mp.adapter_state_dict(model, name="fr"), adapter)
    ):  # fmt: skip
        assert now.keys() == then.keys()
        assert all(torch.equal(now[key], then[key]) for key in then)
    parameters = [*mp.adapter_parameters(model)]
    assert len(parameters) == len({id(p) for p in parameters}) == 10


def test_disable_adapters_is_the_base_for_all_rows():
    model, x = make(), torch.randn(6, 64)
    with mp.disable_adapters(model):
        base = model(x)
    mp.use_adapters(model, rows=ROWS)
    served = model(x)
    with mp.disable_adapters(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), served)


def test_the_plain_module_is_called_with_its_hooks():
    model, calls = make(), []
    innermost(model[0]).register_forward_hook(lambda *_: calls.append(1))
    mp.use_adapters(model, rows=["fr", None])
    model(torch.randn(2, 64))
    assert calls == [1]


def test_a_bank_by_hand_does_not_train_and_passes_gradients_on():
    x = torch.randn(3, 8, requires_grad=True)
    bank = LoRABank(nn.Linear(8, 4), 2, 3).train()
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match="copies of factors, which do not train"):
            bank(x)
        with torch.no_grad():
            bank(x)
        bank.eval()(x).sum().backward()
    assert x.grad is not None


def test_autocast():
    model, x = make(), torch.randn(6, 64)
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    # two layers, in each roundings to bf16 (2**-9) of input, factors, x A^T and output
    assert relative(y.float(), expected) <= 2 * 5 * 2.0**-8


def test_a_copy_has_rows_of_its_own():
    model, x = make(), torch.randn(6, 64)
    mp.use_adapters(model, rows=ROWS)
    expected, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    mp.use_adapters(twin, rows=[None] * 6)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


def test_load_pads_and_clear_empties():
    base, x = nn.Linear(8, 4), torch.randn(3, 8)
    bank = LoRABank(base, 2, 4).eval()
    bank.gate.fill_(1.0)
    for rank in (4, 2):  # a smaller one after a larger one
        a, b = torch.randn(rank, 8), torch.randn(4, rank)
        bank.load(1, a, b)
        expected = base(x) + mp.lora_forward(x, a, b, 1.0)
        torch.testing.assert_close(bank(x), expected, rtol=1e-5, atol=1e-5)  # order of sums
    bank.clear(1)
    assert torch.equal(bank(x), base(x))
    assert list(bank.state_dict()) == ["base.weight", "base.bias"]


def test_bad_factors_raise_and_change_nothing():
    bank = LoRABank(nn.Linear(8, 4), 2, 3)
    bank.load(0, torch.ones(3, 8), torch.ones(4, 3))
    before = bank.a.clone(), bank.b.clone()
    for slot, a, b in (
        (2, (3, 8), (4, 3)), (-1, (3, 8), (4, 3)), (0, (4, 8), (4, 4)), (0, (3, 7), (4, 3)),
        (0, (3, 8), (5, 3)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="LoRABank"):
            bank.load(slot, torch.zeros(a), torch.zeros(b))
        assert torch.equal(bank.a, before[0])
        assert torch.equal(bank.b, before[1])
    for capacity, rank in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            LoRABank(nn.Linear(8, 4), capacity, rank)
    with pytest.raises(ValueError, match="no linear layer"):
        LoRABank(nn.ReLU(), 1, 1)


def test_bad_rows_change_nothing():
    model, x = make(), torch.randn(6, 64)
    before = model(x)
    for rows, match in (([], "empty"), (["es"], "'es'"), (["fr", ["de", "es"]], "'es'")):
        with pytest.raises(ValueError, match=match):
            mp.use_adapters(model, rows=rows)
        assert torch.equal(model(x), before)
    mp.merge(model)
    with pytest.raises(ValueError, match="is merged"):
        mp.use_adapters(model, rows=["fr"])
    mp.unmerge(model)
    mp.use_adapters(model, rows=ROWS)
    served = model(x)
    for call in (
        lambda: mp.use_adapters(model, rows=["es"] * 6), lambda: mp.merge(model),
        lambda: mp.inject_lora(model, ["0"], 1, name="it"), lambda: mp.remove(model),
        lambda: mp.combine_adapters(model, ["fr"], [1.0], new_name="it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"'es'|rows"):
            call()
        assert torch.equal(model(x), served)


def test_two_layers_of_one_adapter_over_a_module_are_both_used():
    twice, x = nn.Sequential(LoRALinear(LoRALinear(nn.Linear(8, 8), 2), 2)), torch.randn(2, 8)
    randomize(twice.eval())
    both, base = twice(x), innermost(twice[0])(x)
    mp.use_adapters(twice, rows=["default", None])
    assert relative(twice(x)[0], both[0]) <= 1e-6  # float32; matrices of another size
    assert torch.equal(twice(x)[1], base[1])


def test_rows_agree_with_peft(capsys):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 15), nn.ReLU(), nn.Linear(15, 7)).eval()
    config = {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    theirs.add_adapter("fr", peft.LoraConfig(**config))
    mp.inject_lora(model, ["0", "2"], 3, 5)
    mp.inject_lora(model, ["0", "2"], 3, 5, name="fr")
    randomize(model)
    with torch.no_grad():
        for name, places in named(model).items():
            for place, (layer,) in places.items():
                their_layer = theirs.base_model.model[int(place)]
                their_layer.lora_A[name].weight.copy_(layer.lora_a)
                their_layer.lora_B[name].weight.copy_(layer.lora_b)
    x, rows = torch.randn(5, 16), ["fr", None, "default", None, "fr"]
    mp.use_adapters(model, rows=rows)
    expected = theirs.eval()(x, adapter_names=[row or "__base__" for row in rows])
    difference = relative(model(x), expected)
    with capsys.disabled():
        print(f"\nrows of a mixed batch against PEFT: {difference:.1e} relative")
    assert difference <= 1e-6  # the same products in another order


def test_an_adapter_with_nan_or_inf_is_refused():
    """Times a gate of zero it would be NaN, in the rows of others too."""
    for value in (torch.nan, torch.inf):
        model, x = make(), torch.randn(6, 64)
        mp.use_adapters(model, rows=ROWS)
        before = model(x)
        with torch.no_grad():
            named(model)["de"]["2"][0].lora_b[0] = value
        with pytest.raises(ValueError, match="'de' holds NaN or Inf over '2'"):
            mp.use_adapters(model, rows=["fr"] * 6)
        assert torch.equal(model(x), before)
        bank = LoRABank(nn.Linear(8, 4), 1, 1)
        with pytest.raises(ValueError, match="NaN or Inf"):
            bank.load(0, torch.full((1, 8), value), torch.ones(4, 1))
        assert not bank.a.any()


def test_another_kind_of_adapter_that_is_on_is_refused():
    """It would act on every row, where rows cannot be told apart."""
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    rows = torch.randn(2, 3, 8)
    mp.inject_lora(model, ["self_attn"], 2)
    mp.inject_lora(model, ["linear1"], 2, name="fr")
    randomize(model)
    with pytest.raises(ValueError, match="others must be off"):
        mp.use_adapters(model, rows=["fr", None])
    mp.use_adapters(model, "fr")
    mp.use_adapters(model, rows=["fr", None])
    with mp.disable_adapters(model):
        base = model(rows)
    assert torch.equal(model(rows)[1], base[1])
    assert not torch.equal(model(rows)[0], base[0])


def test_a_shared_module_has_one_bank_that_stays():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)}).eval()
    model["b"] = model["a"]
    mp.inject_lora(model, ["a", "b"], 2)
    mp.use_adapters(model, rows=["default", None])
    bank = model["a"]
    assert bank is model["b"]
    mp.use_adapters(model, rows=[None, "default"])
    assert model["a"] is bank
    assert model["b"] is bank


def test_a_model_that_is_itself_a_layer_is_refused():
    with pytest.raises(ValueError, match="itself an adapter layer"):
        mp.use_adapters(LoRALinear(nn.Linear(8, 4), 2), rows=["default"])


def test_scaling_while_rows_are_served_counts_from_the_next_rows_on():
    model, x = make(), torch.randn(6, 64)
    mp.use_adapters(model, rows=ROWS)
    before = model(x)
    mp.scale_adapters(model, 0.5)
    assert torch.equal(model(x), before)
    assert model[0].strength == 1  # what compiled code multiplies the gate by
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), expected) <= ROUNDING


def test_float64_adapters_are_served_in_float64():
    model, x = make(), torch.randn(6, 64, dtype=torch.float64)
    model.double()
    expected = one_by_one(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), expected) <= 1e-14  # float64; another order


def test_rows_set_in_inference_mode_can_be_changed_outside():
    model, x = make(), torch.randn(6, 64)
    with torch.inference_mode():
        mp.use_adapters(model, rows=[None] * 6)
    mp.use_adapters(model, rows=ROWS)
    assert relative(model(x), one_by_one(model, x, ROWS)) <= ROUNDING


def test_the_model_may_be_moved_while_rows_are_served():
    model = make()
    mp.use_adapters(model, rows=ROWS)
    assert model.to("meta")(torch.empty(6, 64, device="meta")).shape == (6, 7)


def test_a_transformer_layer_does_not_go_round_the_bank():
    """In eval() it multiplies by `linear1.weight` itself, unless that is a meta tensor."""
    torch.manual_seed(4)
    model = nn.TransformerEncoderLayer(16, 2, 31, batch_first=True).eval()
    mp.inject_lora(model, ["linear1", "linear2"], 3)
    randomize(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        adapted = model(x)
        with mp.disable_adapters(model):
            base = model(x)
        mp.use_adapters(model, rows=["default", None])
        y = model(x)
    assert model.linear1.weight.shape == (31, 16)
    assert model.linear1.weight.dtype == torch.float32
    assert (
        relative(y, torch.stack([adapted[0], base[1]])) <= ROUNDING
    )  # torch's fused layer differs


def test_state_dicts_of_adapters_keep_their_names_while_rows_are_served():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mp.inject_lora(model, ["0", "1"], 2)
    mp.inject_lora(model, ["0"], 2, name="fr")
    before = set(mp.adapter_state_dict(model))
    mp.use_adapters(model.eval(), rows=["fr", None])
    assert set(mp.adapter_state_dict(model)) == before
    assert set(mp.base_state_dict(model)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def like_a_launch(out, x, a, b, gate):
    """What torch sees of a kernel: a new tensor that is filled behind its back."""
    made = add_rows(*(t.detach() for t in (out, x, a, b, gate)))
    return torch.tensor(made.tolist())


@torch.enable_grad()
def test_kernels_are_asked_only_where_nobody_follows(monkeypatch):
    layer = LoRABank(nn.Linear(16, 8), 2, 4, gate=torch.tensor([[1.0, 0], [0, 1]])).eval()
    for slot in range(2):
        layer.load(slot, torch.randn(4, 16), torch.randn(8, 4))
    layer.requires_grad_(False)
    asked = []
    choose = lambda *_: asked.append(1) or like_a_launch  # noqa: E731
    monkeypatch.setattr(ops.OPERATORS["lora_rows"], "choose", choose)
    x = torch.randn(2, 16)
    expected = add_rows(innermost(layer)(x), x, layer.a, layer.b, layer.gate)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)  # the same function
    assert len(asked) == 1
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    graph = make_fx(layer)(x)
    torch.testing.assert_close(graph(2 * x), layer(2 * x), rtol=1e-6, atol=1e-6)  # float32
    layer.gate.requires_grad_()
    assert layer(x).requires_grad
    assert len(asked) == 2
