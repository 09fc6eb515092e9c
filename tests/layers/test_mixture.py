"""LoRA on the 3-D weights of experts: a float64 loop, NF4, transformers' mixtures, PEFT."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft.inject import swap
from minipeft.layers import LoRAExperts, NF4Experts
from minipeft.layers.mixture import (
    DenseExperts,
    by_expert,
    experts_from_peft,
    peft_from_experts,
)

# float32, the same products in another order, values up to 12: measured 2e-6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def trained(base, rank=3, alpha=5, **arguments):
    """A layer whose B are not zero."""
    layer = LoRAExperts(base, rank, alpha, **arguments)
    nn.init.normal_(layer.lora_b, std=0.3)
    return layer


def weight(n_experts=4, out_features=8, in_features=16):
    return nn.Parameter(torch.randn(n_experts, out_features, in_features))


SIZES = st.sampled_from([1, 7, 63])


@given(
    n_experts=st.sampled_from([1, 2, 5]), out_features=SIZES, in_features=SIZES,
    rank=st.sampled_from([1, 3]), tokens=st.sampled_from([0, 1, 9]), transposed=st.booleans(),
)  # fmt: skip
def test_output_and_gradients_equal_a_float64_loop(
    n_experts, out_features, in_features, rank, tokens, transposed
):
    stored = weight(n_experts, out_features, in_features)
    stored = nn.Parameter(stored.detach().mT.contiguous()) if transposed else stored
    layer = trained(stored, rank, transposed=transposed)
    x = torch.randn(tokens, in_features, requires_grad=True)
    expert, grad = torch.randint(0, n_experts, (tokens,)), torch.randn(tokens, out_features)
    y = layer(x, expert)
    y.backward(grad)
    w = stored.detach().double().mT if transposed else stored.detach().double()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    x64 = x.detach().double().requires_grad_()
    rows = [w[e] @ row + 5 / rank * b[e] @ (a[e] @ row) for row, e in zip(x64, expert, strict=True)]
    expected = (
        torch.stack(rows) if rows else x64.new_zeros(0, out_features) + 0 * (a.sum() + b.sum())
    )
    expected.backward(grad.double())
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums of at most 63 products
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(layer.lora_a.grad.double(), a.grad, **tolerance)
    torch.testing.assert_close(layer.lora_b.grad.double(), b.grad, **tolerance)
    if tokens:
        torch.testing.assert_close(x.grad.double(), x64.grad, **tolerance)
    for number in range(n_experts):
        exact = w[number] + 5 / rank * b[number] @ a[number]
        found = layer[number].mT if transposed else layer[number]
        torch.testing.assert_close(found.double(), exact, **tolerance)


def test_first_and_second_derivatives():
    expert = torch.tensor([2, 0, 2, 1, 2])
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True)
               for s in ((5, 3), (4, 2, 3), (4, 6, 2))]  # fmt: skip

    def function(x, a, b):
        return by_expert(x, expert, a, b)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_an_indexed_expert_gives_the_gradients_of_the_call():
    layer, x = trained(weight()), torch.randn(6, 16)
    layer(x, torch.full((6,), 2)).square().sum().backward()
    called = layer.lora_a.grad, layer.lora_b.grad
    layer.zero_grad()
    (x @ layer[torch.tensor(2)].T).square().sum().backward()
    # float32, values up to 146, through two products: measured 2e-5
    torch.testing.assert_close(layer.lora_a.grad, called[0], rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(layer.lora_b.grad, called[1], rtol=3e-5, atol=3e-5)
    assert (layer.lora_b.grad[[0, 1, 3]] == 0).all()


def test_zero_b_and_switched_off_are_the_base():
    for base in (weight(), NF4Experts.from_weight(weight()), trained(weight())):
        layer, x, expert = LoRAExperts(base, 2), torch.randn(5, 16), torch.tensor([3, 0, 0, 1, 3])
        assert torch.equal(layer(x, expert), layer.base(x, expert))
        assert all(torch.equal(layer[i], layer.base[i]) for i in range(4))
        nn.init.normal_(layer.lora_b)
        assert not torch.equal(layer(x, expert), layer.base(x, expert))
        assert not torch.equal(layer[1], layer.base[1])
        layer.enabled = False
        assert torch.equal(layer(x, expert), layer.base(x, expert))
        assert all(torch.equal(layer[i], layer.base[i]) for i in range(4))


def test_the_call_makes_nothing_of_the_weights_size():
    layer, x = trained(weight(8, 64, 96)), torch.randn(20, 96)
    expert, saved = torch.randint(0, 8, (20,)), []

    def record(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(x, expert)
    assert max(saved) <= 20 * 96


def test_the_default_initialisation_is_that_of_each_expert_alone():
    layer = LoRAExperts(weight(6, 4, 256), 16)
    assert layer.lora_a.abs().max() <= 1 / 16
    # a uniform on [-c, c] has deviation c / sqrt(3); 24,576 draws: 1 % is over two standard errors
    assert abs(layer.lora_a.std().item() - 1 / 16 / 3**0.5) < 0.01 / 16
    assert (layer.lora_b == 0).all()


def test_it_looks_like_the_parameter():
    for stored in (weight(), nn.Parameter(weight().detach().bfloat16())):
        layer = trained(stored)
        assert (layer.shape, layer.dtype, layer.device) == (stored.shape, stored.dtype,
                                                            stored.device)  # fmt: skip
        assert len(layer) == 4
        assert layer.weight.shape == stored.shape
        assert layer[0].dtype == stored.dtype
    packed = LoRAExperts(NF4Experts.from_weight(stored), 2)
    assert (packed.shape, packed.dtype) == (stored.shape, torch.bfloat16)
    for wrong in (4, torch.tensor(4), -5):
        with pytest.raises(IndexError):
            layer[wrong]
        with pytest.raises(IndexError):
            packed[wrong]
    with pytest.raises(IndexError, match="expert 4 of 4"):
        layer(torch.randn(1, 16).bfloat16(), torch.tensor([4]))


def test_whole_tensor_use_takes_the_effective_weights_of_all_experts():
    layer, x = trained(weight()), torch.randn(4, 5, 16)
    effective = layer.base.weight + layer.delta()
    for use in (
        lambda w: x @ w.mT, lambda w: torch.bmm(x, w.transpose(1, 2)),
        lambda w: torch.einsum("eti,eoi->eto", x, w), lambda w: torch.stack([w, w]).sum(),
        lambda w: torch.add(input=w, other=1),
    ):  # fmt: skip
        layer.zero_grad()
        torch.testing.assert_close(use(layer), use(effective), **CLOSE)
        use(layer).square().sum().backward()
        assert layer.lora_b.grad.abs().max() > 0
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layer.nonsense  # noqa: B018
    layer.merge()
    with pytest.raises(RuntimeError, match="training while merged"):
        layer.train().transpose(1, 2)
    torch.testing.assert_close(layer.eval().mT, effective.mT, **CLOSE)


def test_layers_stack():
    lower = trained(weight())
    upper = trained(lower, 2)
    x, expert = torch.randn(5, 16), torch.tensor([3, 0, 0, 1, 3])
    exact = lower.base.weight + lower.delta() + upper.delta()
    expected = by_expert(x, expert, exact)
    torch.testing.assert_close(upper(x, expert), expected, **CLOSE)
    torch.testing.assert_close(torch.stack([upper[i] for i in range(4)]), exact, **CLOSE)
    torch.testing.assert_close(upper.merged().weight, exact, **CLOSE)
    upper.enabled = False
    assert torch.equal(upper(x, expert), lower(x, expert))
    upper.enabled, lower.enabled = True, False
    torch.testing.assert_close(upper[2], lower.base.weight[2] + upper.delta()[2], **CLOSE)
    stored = trained(nn.Parameter(torch.randn(4, 16, 8)), transposed=True)
    assert trained(stored).lora_a.shape == (4, 3, 16)  # a stack has one layout


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_merge_unmerge_merged_and_fold(packed, stacked):
    base = NF4Experts.from_weight(weight()) if packed else weight()
    layer = trained(trained(base) if stacked else base).eval()
    x, expert = torch.randn(5, 16), torch.tensor([3, 0, 0, 1, 3])
    before, expected = copy.deepcopy(layer.state_dict()), layer(x, expert)
    layer.merge()
    torch.testing.assert_close(layer(x, expert), expected, **CLOSE)
    assert torch.equal(layer[1], layer.merged_module.weight[1])
    layer.train()
    for use in (lambda: layer(x, expert), lambda: layer[1]):
        with pytest.raises(RuntimeError, match="training while merged"):
            use()
    layer.eval().unmerge()
    assert torch.equal(layer(x, expert), expected)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    if packed:
        again = layer.merged(requantize=True)
        assert isinstance(again, NF4Experts)
        assert (again.dequantize() - layer.weight).abs().max() < 1  # of numbers up to 4
    folded = layer.fold()
    assert isinstance(folded, DenseExperts)
    assert isinstance(folded.original(), nn.Parameter)
    torch.testing.assert_close(folded(x, expert), expected, **CLOSE)
    if not packed:
        assert folded.original() is base


@pytest.mark.parametrize("transposed", [False, True])
def test_merged_bf16_weights_are_the_float32_sums_rounded_once(transposed):
    shape = (4, 16, 8) if transposed else (4, 8, 16)
    stored = nn.Parameter(torch.randn(shape).bfloat16())
    layer = trained(trained(stored, transposed=transposed))
    deltas = [x.delta().mT if transposed else x.delta() for x in (layer.base, layer)]
    exact = (stored.float() + deltas[0]) + deltas[1]
    assert torch.equal(layer.merged().weight, exact.bfloat16())
    assert torch.equal(torch.stack([layer[i] for i in range(4)]), exact.bfloat16())


def test_nf4_experts():
    packed = NF4Experts.from_weight(weight())
    layer, x, expert = trained(packed), torch.randn(5, 16), torch.tensor([3, 0, 0, 1, 3])
    exact = packed.dequantize() + layer.delta()
    torch.testing.assert_close(layer(x, expert), by_expert(x, expert, exact), **CLOSE)
    torch.testing.assert_close(layer[3], exact[3], **CLOSE)
    layer(x, expert).sum().backward()
    assert (layer.lora_b.grad[2] == 0).all()
    assert (layer.lora_b.grad[3] != 0).all()
    turned = trained(NF4Experts.from_weight(torch.randn(4, 16, 8)), transposed=True)
    assert turned[0].shape == (16, 8)
    with pytest.raises(ValueError, match="indexed, not called"):
        turned(x, expert)


def test_dropout_acts_in_the_call_only():
    layer = trained(weight(), dropout=0.5)
    x, expert = torch.randn(5, 16), torch.tensor([3, 0, 0, 1, 3])
    assert not torch.equal(layer(x, expert), layer(x, expert))
    assert torch.equal(layer[0], layer[0])
    layer.eval()
    torch.testing.assert_close(layer(x, expert), by_expert(x, expert, layer.weight), **CLOSE)
    silent = LoRAExperts(weight(), 2, dropout=0.9)  # B = 0: the base path sees no dropout
    assert torch.equal(silent(x, expert), silent.base(x, expert))


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_computes_in_its_dtype(packed):
    layer = trained(NF4Experts.from_weight(weight()) if packed else weight())
    x, expert = torch.randn(5, 16), torch.tensor([3, 0, 0, 1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, expert)
    assert y.dtype == torch.bfloat16
    # inputs, weights and sums are rounded to bf16: a few times 2**-9 of numbers around 10
    torch.testing.assert_close(y.float(), layer(x, expert), rtol=0.05, atol=0.2)
    y.sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32


def test_copies_and_state():
    for base in (weight(), NF4Experts.from_weight(weight())):
        layer = trained(base)
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(again[1], layer[1])
            assert again.lora_b.data_ptr() != layer.lora_b.data_ptr()
        fresh = weight() if isinstance(base, nn.Parameter) else NF4Experts.from_weight(weight())
        other = LoRAExperts(fresh, 3, 5)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other[1], layer[1])
    assert list(trained(weight()).state_dict()) == ["lora_a", "lora_b", "base.weight"]


def test_a_start_that_is_subtracted():
    layer = trained(weight(), init=lambda layer: (nn.init.normal_(layer.lora_b),
                                                  layer.subtract_start()))  # fmt: skip
    with torch.no_grad():
        layer.lora_b.copy_(layer.lora_b0)
    torch.testing.assert_close(layer.delta(), torch.zeros(4, 8, 16), **CLOSE)
    torch.testing.assert_close(layer[2], layer.base.weight[2], **CLOSE)


@pytest.mark.slow
def test_compiled_it_switches_and_scales_without_compiling_again(plain_python):
    printed = plain_python("""
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from minipeft.layers import LoRAExperts

torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = LoRAExperts(nn.Parameter(torch.randn(3, 4, 8)), 2)
        nn.init.normal_(self.weight.lora_b)

    def forward(self, x):
        return x @ self.weight[1].T + x @ self.weight[2].T

model, x = Model(), torch.randn(5, 8)
expert = torch.tensor([2, 0, 0, 1, 2])
counter, other = (CompileCounterWithBackend("aot_eager") for _ in range(2))
compiled = torch.compile(model, backend=counter, fullgraph=True)
called = torch.compile(model.weight, backend=other)  # the counts of rows are numbers: it breaks
for step, (on, scale) in enumerate(((True, 1.0), (False, 1.0), (True, 0.25))):
    model.weight.enabled, model.weight.scale = on, scale
    for ours, expected in ((compiled(x), model(x)),
                           (called(x, expert), model.weight(x, expert))):
        # float32: compiled code may sum in another order
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        model.zero_grad()
        ours.sum().backward()
        assert (model.weight.lora_b.grad != 0).any() == on
    frames = other.frame_count if step == 0 else frames
print(counter.frame_count, other.frame_count == frames)
""")
    assert printed.split() == ["1", "True"]


def test_bad_input_raises(plain_python):
    plain_python("""
import pytest, torch
from torch import nn
from minipeft.layers import LoRAExperts

weight = nn.Parameter(torch.randn(3, 4, 8))
for base in (torch.randn(3, 4, 8), "weight"):
    with pytest.raises(TypeError, match="expected a parameter or module"):
        LoRAExperts(base, 2)
for base in (nn.Parameter(torch.randn(4, 8)),
             nn.Parameter(torch.zeros(3, 4, 8, dtype=torch.long), requires_grad=False)):
    with pytest.raises(ValueError, match="floats of 3 axes"):
        LoRAExperts(base, 2)
with pytest.raises(ValueError, match="Linear holds no experts"):
    LoRAExperts(nn.Linear(4, 8), 2)
for arguments in ({"rank": 0}, {"rank": 2, "alpha": 0}, {"rank": 2, "dropout": 1.0}):
    with pytest.raises(ValueError):
        LoRAExperts(weight, **arguments)
assert weight.requires_grad
""")
    with pytest.raises(ValueError, match="rank 7 in all for 3 experts"):
        experts_from_peft(torch.zeros(7, 2), torch.zeros(4, 7), 3)


def mixture(kind):
    import transformers as tf

    tiny = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    if kind == "Mixtral":
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**tiny, num_local_experts=4,
                                                       intermediate_size=24))  # fmt: skip
    elif kind == "Qwen3-MoE":
        model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(
            **tiny, num_experts=4, intermediate_size=24, moe_intermediate_size=24))  # fmt: skip
    else:
        model = tf.GptOssForCausalLM(tf.GptOssConfig(
            **tiny, num_local_experts=4, intermediate_size=24,
            layer_types=["full_attention"] * 2))  # fmt: skip
    model.set_experts_implementation("eager")
    return model.eval()


NAMES = ["gate_up_proj", "down_proj"]


def wrapped(model, names=NAMES, rank=2, alpha=None, **arguments):
    """Puts a layer with a B that is not zero over each of these parameters."""
    chosen = {n: p for n, p in model.named_parameters() if n.endswith(tuple(names))}
    layers = {n: trained(p, rank, alpha, **arguments) for n, p in chosen.items()}
    swap(model, layers)
    model.train(model.training)  # a parameter knew no mode
    return chosen, layers


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_in_a_mixture_of_experts_of_transformers(kind, capsys):
    pytest.importorskip("transformers")
    model, ids = mixture(kind), torch.randint(0, 32, (2, 9))
    plain, before = copy.deepcopy(model), model(ids).logits
    parameters, layers = wrapped(model, transposed=kind == "gpt-oss")
    y = model(ids).logits
    y.square().sum().backward()
    for name, layer in layers.items():
        parameter = plain.get_parameter(name)
        parameter.data += layer.delta_as_stored()
    expected = plain(ids).logits
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, **CLOSE)
    assert not torch.allclose(y, before, atol=1e-3)  # a hundred times CLOSE: B is not zero
    for name, layer in layers.items():  # dB = scaling dW A^T, dA = scaling B^T dW, expert by expert
        grad = plain.get_parameter(name).grad
        grad = grad.mT if layer.transposed else grad
        torch.testing.assert_close(layer.lora_b.grad, grad @ layer.lora_a.mT, **CLOSE)
        torch.testing.assert_close(layer.lora_a.grad, layer.lora_b.mT @ grad, **CLOSE)
    with mp.disable_adapters(model):
        assert torch.equal(model(ids).logits, before)
    mp.merge(model)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    mp.unmerge(model)
    mp.remove(model)
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    assert torch.equal(model(ids).logits, before)
    with capsys.disabled():
        worst = float((y - expected).detach().abs().max())
        print(f"\n{kind} with LoRA on its experts against merged weights: {worst:.1e}")


def test_folding_into_a_mixture_of_experts_fills_the_very_parameters():
    pytest.importorskip("transformers")
    model, ids = mixture("Mixtral"), torch.randint(0, 32, (2, 9))
    parameters, _ = wrapped(model)
    expected = model(ids).logits
    mp.remove(model, merge=True)
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_every_implementation_of_experts_gives_the_same(kind, implementation):
    """grouped_mm takes the weights whole, batched_mm indexes by all tokens at once."""
    pytest.importorskip("transformers")
    model, ids = mixture(kind), torch.randint(0, 32, (2, 9))
    _, layers = wrapped(model, transposed=kind == "gpt-oss")
    results = []
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().sum().backward()
        results += [logits, *(layer.lora_b.grad.clone() for layer in layers.values())]
    half = len(results) // 2
    for ours, eager in zip(results[half:], results[:half], strict=True):
        torch.testing.assert_close(ours, eager, **CLOSE)
    with mp.disable_adapters(model):
        off = model(ids).logits
    assert (off - results[0]).abs().max() > 1e-3  # a hundred times CLOSE
    mp.merge(model)
    torch.testing.assert_close(model(ids).logits, results[0], **CLOSE)


def test_experts_under_the_implementation_that_a_model_has_by_default():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts_per_tok=2, head_dim=8, num_experts=4,
        intermediate_size=24, moe_intermediate_size=24,
    )  # fmt: skip
    model, ids = transformers.Qwen3MoeForCausalLM(config).eval(), torch.randint(0, 32, (2, 9))
    before = model(ids).logits
    names = mp.inject_lora(model, ["gate_up_proj", "down_proj"], 2)
    assert len(names) == 2
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)  # B = 0
    model.train()(ids).logits.sum().backward()
    assert mp.check_gradients(model) == 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT
@pytest.mark.parametrize("kind", ["Mixtral", "gpt-oss"])
def test_outputs_equal_those_of_pefts_target_parameters(kind, capsys):
    peft = pytest.importorskip("peft")
    ours, ids = mixture(kind), torch.randint(0, 32, (2, 9))
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[],
        target_parameters=["experts.gate_up_proj"],
    )  # fmt: skip
    before, theirs = ours(ids).logits, peft.get_peft_model(copy.deepcopy(ours), config)
    _, layers = wrapped(ours, NAMES[:1], 3, 6, transposed=kind == "gpt-oss")
    for name, layer in layers.items():
        wrapper = theirs.base_model.model.get_submodule(name.rpartition(".")[0])
        a, b = peft_from_experts(layer.lora_a.detach(), layer.lora_b.detach())
        wrapper.lora_A["default"].weight.data.copy_(a)
        wrapper.lora_B["default"].weight.data.copy_(b)
        again = experts_from_peft(a, b, 4)
        assert torch.equal(again[0], layer.lora_a)
        assert torch.equal(again[1], layer.lora_b)
        torch.testing.assert_close(
            layer.delta_as_stored(), wrapper.get_delta_weight("default"), **CLOSE
        )
    y, expected = ours(ids).logits, theirs(ids).logits
    assert (expected - before).abs().max() > 0.001  # it does something
    torch.testing.assert_close(y, expected, **CLOSE)
    with capsys.disabled():
        worst = float((y - expected).detach().abs().max())
        print(f"\n{kind} against PEFT's target_parameters: {worst:.1e}")
