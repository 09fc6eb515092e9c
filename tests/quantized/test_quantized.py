"""Conv1D, embedding and experts in NF4: what they compute, and that their bytes stay what they are.

Each behaviour is one that a peer fails: bitsandbytes' layers change in eval() and reload wrongly,
its Embedding4bit has no state dict, torchao's tensors are no safetensors and drift when copied.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.layers import NF4Conv1D, NF4Embedding, NF4Experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def conv1d(n_in, n_out, dtype=torch.float32):
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(n_out, n_in).to(dtype)
    nn.init.normal_(module.bias)
    return module


MAKE = {
    "linear": lambda **nf4: NF4Linear.from_linear(nn.Linear(128, 48), **nf4),
    "ragged linear": lambda **nf4: NF4Linear.from_linear(nn.Linear(100, 7), **nf4),
    "conv1d": lambda **nf4: NF4Conv1D.from_linear(conv1d(128, 48), **nf4),
    "embedding": lambda **nf4: NF4Embedding.from_embedding(nn.Embedding(50, 64), **nf4),
    "ragged embedding": lambda **nf4: NF4Embedding.from_embedding(nn.Embedding(33, 7), **nf4),
    "experts": lambda **nf4: NF4Experts.from_weight(torch.randn(5, 16, 64), **nf4),
    "ragged experts": lambda **nf4: NF4Experts.from_weight(torch.randn(3, 16, 36), **nf4),
}
EMPTY = {
    "linear": lambda **kw: NF4Linear(128, 48, **kw),
    "ragged linear": lambda **kw: NF4Linear(100, 7, **kw),
    "conv1d": lambda **kw: NF4Conv1D(128, 48, **kw),
    "embedding": lambda **kw: NF4Embedding(50, 64, **kw),
    "ragged embedding": lambda **kw: NF4Embedding(33, 7, **kw),
    "experts": lambda **kw: NF4Experts(5, 16, 64, **kw),
    "ragged experts": lambda **kw: NF4Experts(3, 16, 36, **kw),
}
KINDS = list(MAKE)


def call(layer, *, dtype=None, grad=False):
    """The layer's output for inputs that are always the same; the input too."""
    torch.manual_seed(1)
    if isinstance(layer, NF4Embedding):
        rows = torch.randint(layer.num_embeddings, (2, 5))
        return layer(rows), rows
    x = torch.randn(9, layer.shape[-1]).to(dtype or layer.weight_dtype).requires_grad_(grad)
    if isinstance(layer, NF4Experts):
        return layer(x, torch.randint(len(layer), (9,))), x
    return layer(x), x


def state_bytes(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same_state(layer, before, *, skip=()):
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name in before.keys() - set(skip):
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d_computes_with_the_transposed_codes(dtype, double_quant):
    dense = conv1d(128, 48, dtype)
    layer = NF4Conv1D.from_linear(dense, double_quant=double_quant)
    assert layer.weight.shape == dense.weight.shape == (128, 48)
    assert (layer.nx, layer.nf, layer.in_features, layer.out_features) == (128, 48, 128, 48)
    packed, _ = mp.quantize_nf4(dense.weight.T)
    assert torch.equal(layer.packed.flatten(), packed)
    x = torch.randn(3, 128, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight.T, layer.bias))
    plain = layer.dense()
    assert type(plain) is type(dense)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(50, 64), (33, 7), (9, 100), (7, 1), (1, 256), (5, 96)])
def test_embedding_equals_the_decoded_table(rows, dim, dtype, double_quant):
    layer = NF4Embedding.from_embedding(
        nn.Embedding(rows, dim, dtype=dtype), double_quant=double_quant
    )
    wanted = torch.randint(rows, (4, 3))
    assert torch.equal(layer(wanted), F.embedding(wanted, layer.weight))
    assert layer(wanted).dtype == dtype
    assert layer(wanted[:0]).shape == (0, 3, dim)
    with pytest.raises(IndexError, match=f"row {rows} of a table of {rows} rows"):
        layer(torch.tensor([rows]))
    with pytest.raises(IndexError, match="row -1"):
        layer(torch.tensor([0, -1]))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["embedding", "ragged embedding", "experts", "ragged experts"])
def test_the_plain_functions_equal_the_fast_ones_in_every_bit(kind, double_quant):
    layer, found = MAKE[kind](double_quant=double_quant), []
    for rows in (True, "plain"):
        with mp.use_kernels(rows):
            out, x = call(layer, grad=True)
            results = [out]
            if x.requires_grad:
                results += torch.autograd.grad(out.square().sum(), x)
            wrong = (torch.full(x.shape[:1], 99),)
            with pytest.raises(IndexError, match="99 of"):
                layer(*(x, *wrong) if isinstance(layer, NF4Experts) else wrong)
        found.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_embedding_never_decodes_the_table(monkeypatch):
    layer = NF4Embedding.from_embedding(nn.Embedding(5000, 64))
    decoded = []
    original = torch.empty

    def counting(*size, **settings):
        out = original(*size, **settings)
        decoded.append(out.numel())
        return out

    monkeypatch.setattr(torch, "empty", counting)
    with mp.use_kernels(True):
        layer(torch.tensor([3, 4999]))
    assert decoded and max(decoded) <= 2 * 64


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), [(16, 64), (16, 36), (3, 128)])
def test_experts_equal_a_loop_in_float64(out_features, in_features, double_quant):
    layer = NF4Experts.from_weight(
        torch.randn(5, out_features, in_features), double_quant=double_quant, block_size=32
    )
    dense = layer.dequantize(torch.float64)
    for number in range(5):
        assert torch.equal(layer[number].double(), dense[number])
    assert torch.equal(layer[torch.tensor(2)], layer[2])
    expert = torch.tensor([4, 0, 0, 2, 4, 1, 4])
    x = torch.randn(7, in_features, requires_grad=True)
    grad = torch.randn(7, out_features)
    y = layer(x, expert)
    y.backward(grad)
    expected = torch.stack([dense[e] @ row for e, row in zip(expert, x.double(), strict=True)])
    gradient = torch.stack(
        [g @ dense[e] for e, g in zip(expert, grad.double(), strict=True)]
    )  # float32 sums of up to 128 products
    # values up to 26: measured 3e-6
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-5, atol=1e-5)
    assert layer(x[:0], expert[:0]).shape == (0, out_features)


@pytest.mark.parametrize("how", ["half", "bfloat16", "float"])
@pytest.mark.parametrize("kind", KINDS)
def test_casts_touch_no_code_and_the_output_follows(kind, how):
    layer = MAKE[kind]()
    before = state_bytes(layer)
    getattr(layer, how)()
    assert_same_state(layer, before, skip=("bias",))
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}[how]
    assert layer.weight.dtype == dtype == call(layer)[0].dtype


@pytest.mark.parametrize("kind", KINDS)
def test_train_eval_train_changes_no_byte(kind):
    layer = MAKE[kind]()
    before, first = state_bytes(layer), call(layer)[0]
    layer.eval()
    with torch.no_grad():
        call(layer)
    layer.train()
    assert torch.equal(call(layer)[0], first)
    assert_same_state(layer, before)


def empty(layer, kind, **keywords):
    return EMPTY[kind](dtype=torch.float32, double_quant=layer.double_quant, **keywords)


def reload(state, layer, kind):
    fresh = empty(layer, kind)
    fresh.load_state_dict(state, strict=True)
    return fresh


def by_torch_save(layer, kind):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return reload(torch.load(file, weights_only=True), layer, kind)


def by_safetensors(layer, kind):
    from safetensors.torch import load, save

    return reload(load(save(layer.state_dict())), layer, kind)


def by_assigning(layer, kind):
    fresh = empty(layer, kind, device="meta")
    fresh.load_state_dict(layer.state_dict(), assign=True)
    return fresh


def by_to_empty(layer, kind):
    fresh = empty(layer, kind, device="meta").to_empty(device="cpu")
    fresh.load_state_dict(layer.state_dict())
    return fresh


ROUND_TRIPS = {
    "deepcopy": lambda layer, kind: copy.deepcopy(layer),
    "pickle": lambda layer, kind: pickle.loads(pickle.dumps(layer)),
    "strict reload": lambda layer, kind: reload(layer.state_dict(), layer, kind),
    "torch.save": by_torch_save, "safetensors": by_safetensors, "assign": by_assigning,
    "meta, to_empty": by_to_empty,
}  # fmt: skip


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("how", ROUND_TRIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, how, double_quant):
    layer = MAKE[kind](double_quant=double_quant)
    again = ROUND_TRIPS[how](layer, kind)
    assert_same_state(again, state_bytes(layer))
    assert torch.equal(call(again)[0], call(layer)[0])


def test_a_codebook_of_its_own_stays_with_the_layer():
    layer = NF4Linear.from_linear(nn.Linear(64, 16), double_quant=False)
    layer.fill({
        "packed": layer.packed, "absmax": layer.absmax,
        "codebook": torch.tensor(mp.codebooks.FP4),
    })  # fmt: skip
    codes = layer.packed.flatten()
    expected = mp.codebooks.dequantize_blockwise(
        codes, layer.absmax.flatten(), (16, 64), mp.codebooks.FP4
    )
    assert torch.equal(layer.weight, expected)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    # float32 sums of 16: measured 0
    torch.testing.assert_close(x.grad, expected.sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
    again = NF4Linear(64, 16, double_quant=False, codebook=[0.0] * 15 + [1.0])
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(again)(x), layer(x))
    with pytest.raises(RuntimeError, match="codebook"):
        NF4Linear(64, 16, double_quant=False).load_state_dict(layer.state_dict())
    with pytest.raises(AttributeError, match="computed from codes"):
        layer.codebook = None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "embedding" not in kind])
def test_nothing_of_the_dense_size_is_saved_and_checkpointing_changes_nothing(kind):
    layer = MAKE[kind]()
    saved = []

    def record(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        y, x = call(layer, grad=True)
    y.square().sum().backward()
    assert saved and max(saved) <= layer.packed.numel()
    for reentrant in (False, True):
        torch.manual_seed(1)
        again = torch.randn_like(x).requires_grad_(True)
        assert torch.equal(again, x)
        rest = (torch.randint(len(layer), (9,)),) if isinstance(layer, NF4Experts) else ()
        out = checkpoint(layer, again, *rest, use_reentrant=reentrant)
        out.square().sum().backward()
        assert torch.equal(out, y) and torch.equal(again.grad, x.grad)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "embedding" not in kind])
def test_autocast_and_compute_dtype(kind):
    layer = MAKE[kind]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(layer, dtype=torch.float32)[0].dtype == torch.bfloat16
    narrow = MAKE[kind](compute_dtype=torch.bfloat16)
    y, _ = call(narrow, dtype=torch.float32)
    assert y.dtype == torch.float32 and torch.equal(y, y.bfloat16().float())


COMPILE = """
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
import minipeft as mp

torch.manual_seed(0)
expert = torch.tensor([2, 0, 2, 1, 4])
layers = {
    "conv1d": (mp.layers.NF4Conv1D.from_linear(Conv1D(48, 128)), 128, ()),
    "linear": (mp.NF4Linear.from_linear(nn.Linear(100, 7)), 100, ()),
    "experts": (mp.layers.NF4Experts.from_weight(torch.randn(5, 16, 64)), 64, (expert,)),
}
for name, (layer, width, rest) in layers.items():
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, width, requires_grad=True)
    grads = []
    for model in (compiled, layer):
        x.grad = None
        y = model(x, *rest)
        y.square().sum().backward()
        grads.append((y.detach(), x.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1]), name
table = mp.layers.NF4Embedding.from_embedding(nn.Embedding(50, 64))
compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
rows = torch.randint(50, (2, 5))
assert torch.equal(compiled(rows), table(rows))
print("equal")
"""


def test_every_layer_compiles_whole(plain_python):
    pytest.importorskip("transformers")
    assert plain_python(COMPILE).strip() == "equal"


def test_lora_over_conv1d_trains_merges_and_comes_off():
    base = NF4Conv1D.from_linear(conv1d(64, 32))
    layer = LoRALinear(base, 4)
    nn.init.normal_(layer.lora_b, std=0.1)
    x = torch.randn(5, 64)
    expected = layer(x)
    assert layer.weight.shape == base.weight.shape == (64, 32)
    layer.eval()
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # order of float32 sums
    layer.unmerge()
    plain = layer.merged()
    assert type(plain).__name__ == "Conv1D"
    # float32: the product is rounded into the weight, measured 2e-7
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(layer.merged(requantize=True), NF4Conv1D)


def test_bad_input_raises():
    with pytest.raises(ValueError, match="no transformers Conv1D"):
        NF4Conv1D.from_linear(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="max_norm"):
        NF4Embedding.from_embedding(nn.Embedding(4, 64, max_norm=1.0))
    with pytest.raises(TypeError, match="module"):
        NF4Embedding.from_embedding(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"no nn\.Embedding"):
        NF4Embedding.from_embedding(nn.Linear(4, 4))

    class Scaled(nn.Embedding):
        def forward(self, rows):
            return 2 * super().forward(rows)

    with pytest.raises(ValueError, match="forward of its own"):
        NF4Embedding.from_embedding(Scaled(4, 4))
    with pytest.raises(ValueError, match="no whole number of blocks of 64"):
        NF4Experts.from_weight(torch.randn(2, 3, 5))
    experts = NF4Experts.from_weight(torch.randn(2, 4, 64))
    with pytest.raises(IndexError, match="expert 2 of 2"):
        experts[2]
    with pytest.raises(IndexError, match="expert 7 of 2"):
        experts(torch.randn(1, 64), torch.tensor([7]))
    with pytest.raises(ValueError, match=r"expected \(tokens, 64\)"):
        experts(torch.randn(1, 32), torch.tensor([0]))
    with pytest.raises(AttributeError, match="computed from codes"):
        experts.weight = nn.Parameter(torch.randn(2, 4, 64))
    assert NF4Embedding.from_embedding(nn.Embedding(4, 64, device="meta")).packed.is_meta  # planned


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("own_codebook", [True, False])
def test_offloaded_layers_compute_the_same(how, double_quant, own_codebook, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    mp.quantize_model(model, double_quant=double_quant, head=())
    if own_codebook:
        model[0].fill({**model[0].state_dict(), "codebook": torch.tensor(mp.codebooks.FP4)})
    x = torch.randn(2, 128)
    expected = model(x)
    where = {"offload_dir": tmp_path} if how == "disk_offload" else {}
    getattr(accelerate, how)(model, execution_device="cpu", **where)
    assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):  # loaded, dropped, loaded again
        assert torch.equal(model(x), expected)


def test_no_parameter_is_called_as_what_is_computed_of_it():
    for layer in (
        mp.NF4Linear(64, 8, double_quant=False, codebook=mp.codebooks.FP4), mp.NF4Linear(64, 8),
        mp.layers.NF4Embedding(8, 64, double_quant=False),
        mp.layers.NF4Experts(2, 8, 64, double_quant=False),
    ):  # fmt: skip
        for name, parameter in layer.named_parameters():
            assert getattr(layer, name) is parameter
