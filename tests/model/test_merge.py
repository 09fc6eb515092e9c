"""Merging: exact where it can be, measured where it rounds, finished or not begun."""

import threading

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import NF4Linear
from minipeft.io.files import read_tensors


def make(dtype=torch.float32, quantized=False, std=0.05):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).to(dtype)
    (mp.inject_qlora if quantized else mp.inject_lora)(model, ["0", "2"], 4, 8)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_b, std=std)
    return model.eval()


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_hundred_rounds_leave_every_bit():
    model, x = make(torch.bfloat16), torch.randn(3, 64).bfloat16()
    before, output = bits(model), model(x)
    for _ in range(100):
        assert mp.merge(model) == ["0", "2"]
        assert_same_bits(model, before)
        assert mp.unmerge(model) == ["0", "2"]
    assert_same_bits(model, before)
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("quantized", [False, True])
def test_merged_equals_unmerged_in_float32(quantized, capsys):
    model, x = make(quantized=quantized), torch.randn(50, 64)
    expected = model(x)
    mp.merge(model)
    difference = ((model(x) - expected).abs().max() / expected.abs().max()).item()
    with capsys.disabled():
        print(f"\nmerged against unmerged, float32, NF4={quantized}: {difference:.1e} relative")
    # float32: the product is rounded into the weight, sums of 64: measured 3e-7
    assert difference <= 1e-5


def test_the_bf16_merged_weight_is_the_rounded_float32_sum(capsys):
    model, x = make(torch.bfloat16), torch.randn(50, 64).bfloat16()
    expected = model(x)
    mp.merge(model)
    differing = 0
    for layer in (model[0], model[2]):
        exact = layer.base.weight.float() + layer.scaling * (layer.lora_b @ layer.lora_a)
        differing += int((layer.merged_module.weight != exact.bfloat16()).sum())
    difference = ((model(x) - expected).abs().max() / expected.abs().max()).item()
    with capsys.disabled():
        print(f"\nbf16 merge: {differing} weights differ; outputs by {difference:.1e} relative")
    assert differing == 0
    assert difference < 0.03  # a few roundings of 2**-9 through two layers


@pytest.mark.parametrize("quantized", [False, True])
def test_state_files_and_disabling_are_the_same_merged_or_not(quantized, tmp_path):
    model, x = make(quantized=quantized), torch.randn(2, 64)
    before = bits(model)
    with mp.disable_adapters(model):
        base = model(x)
    mp.save_peft(model, tmp_path / "unmerged")
    mp.merge(model)
    assert_same_bits(model, before)
    with mp.disable_adapters(model):
        assert torch.equal(model(x), base)
    mp.save_peft(model, tmp_path / "merged")
    first, second = tmp_path / "merged", tmp_path / "unmerged"
    config = "adapter_config.json"
    assert (first / config).read_bytes() == (second / config).read_bytes()
    tensors = [read_tensors(folder / "adapter_model.safetensors") for folder in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_what_a_merged_model_refuses():
    model, x = make(), torch.randn(2, 64)
    mp.merge(model)
    model.train()
    with pytest.raises(RuntimeError, match="unmerge"):
        model(x)
    with torch.no_grad():
        model(x)
    for call in (
        lambda: mp.scale_adapters(model, 0.5),
        lambda: mp.load_adapter_state_dict(model, mp.adapter_state_dict(model)),
    ):
        with pytest.raises(ValueError, match="merged"):
            call()
    mp.unmerge(model)
    model(x).sum().backward()
    with pytest.raises(ValueError, match="nothing is merged"):
        mp.unmerge(model)


def test_nan_in_one_layer_merges_none():
    model = make()
    model[2].lora_b.data[0, 0] = float("nan")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"2: .*NaN"):
        mp.merge(model)
    assert model[0].merged_module is None
    with pytest.raises(ValueError, match="weight of 2 holds NaN"):
        mp.remove(model, merge=True)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model[0].base.weight.isfinite().all()


@pytest.mark.parametrize("merged", [False, True])
def test_remove_restores_the_very_modules(merged):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    originals = list(model)
    before = bits(model)
    mp.inject_lora(model, ["0", "1"], 2, init=lambda layer: nn.init.normal_(layer.lora_b))
    if merged:
        mp.merge(model)
    assert mp.remove(model) == ["0", "1"]
    assert list(model) == originals
    assert_same_bits(model, before)


def test_remove_with_merge_gives_plain_layers():
    model, x = make(), torch.randn(5, 64)
    expected = model(x)
    mp.remove(model, merge=True)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)  # float32 order of sums


def test_nf4_merges_into_dense_layers_by_default():
    model, x = make(quantized=True), torch.randn(5, 64)
    expected = model(x)
    mp.remove(model, merge=True)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    # float32: the product is rounded into the weight, measured 2e-7
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_requantising_keeps_nf4_and_reports_its_error():
    model, x = make(quantized=True), torch.randn(5, 64)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"moved them by \d+\.\d+%"):
        mp.remove(model, merge=True, requantize=True)
    assert isinstance(model[0], mp.NF4Linear)
    assert (model(x) - expected).norm() / expected.norm() < 0.25  # two layers of NF4's 9 %
    with pytest.raises(ValueError, match="dense base"):
        mp.remove(make(), merge=True, requantize=True)


def test_tied_weights_are_not_merged_behind_the_other_ones_back():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    mp.inject_lora(model, ["head"], 2)
    with pytest.raises(ValueError, match="tied"):
        mp.remove(model, merge=True)
    mp.remove(model)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_bases_that_take_no_values_are_replaced_not_left_half_done(kind):
    with torch.inference_mode(kind == "inference"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if kind == "expanded":
        model[2].weight = nn.Parameter(torch.zeros(1, 8).expand(8, 8), requires_grad=False)
    mp.inject_lora(model, ["0", "2"], 2)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        mp.remove(model, merge=True)
        assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize("kind", ["linear", "conv1d", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merged_four_bit_layers_take_every_dtype_that_unmerged_ones_take(kind, dtype):
    """Made from 16 bits, a 4-bit layer computes in its input's dtype; so does its merged weight."""
    if kind == "experts":
        weight = nn.Parameter(torch.randn(4, 8, 64).bfloat16())
        layer = mp.layers.LoRAExperts(mp.layers.NF4Experts.from_weight(weight), 2)
        inputs = torch.randn(5, 64, dtype=dtype), torch.tensor([3, 0, 0, 1, 3])
    else:
        if kind == "conv1d":
            transformers = pytest.importorskip("transformers")
            base = mp.layers.NF4Conv1D.from_linear(
                transformers.pytorch_utils.Conv1D(8, 64).bfloat16()
            )
        else:
            base = mp.NF4Linear.from_linear(nn.Linear(64, 8).bfloat16())
        layer, inputs = mp.LoRALinear(base, 2), (torch.randn(5, 64, dtype=dtype),)
    nn.init.normal_(layer.lora_b, std=0.1)
    layer.eval()
    expected = layer(*inputs)
    layer.merge()
    out = layer(*inputs)
    assert out.dtype == dtype == expected.dtype
    off = (out - expected).abs().max() / expected.abs().max()
    assert off < 2**-6  # the merged weight is rounded to bfloat16 once
    if kind == "linear":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(inputs[0].float()).dtype == torch.bfloat16
            assert layer(inputs[0].double()).dtype == torch.float64


def test_a_merged_embedding_keeps_its_dtype():
    layer = mp.layers.LoRAEmbedding(
        mp.layers.NF4Embedding.from_embedding(nn.Embedding(9, 64).bfloat16()), 2
    )
    nn.init.normal_(layer.lora_a)
    ids = torch.tensor([[1, 8]])
    expected = layer.eval()(ids)
    layer.merge()
    assert layer(ids).dtype == expected.dtype == torch.bfloat16


def test_removing_a_prefix_by_merging_names_bake():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20,
    )  # fmt: skip
    for attach in (mp.attach_prefix, mp.attach_prompt):
        model = transformers.LlamaForCausalLM(config)
        attach(model, 3)
        for call in (lambda m: mp.remove(m, merge=True), mp.merge):
            with pytest.raises(ValueError, match=r"bake\(\)"):
                call(model)


def random_lora(model: nn.Module, target, rank: int = 2, **lora) -> nn.Module:
    def init(layer):
        nn.init.normal_(layer.lora_a)
        nn.init.normal_(layer.lora_b)

    mp.inject_lora(model, target, rank, init=init, **lora)
    return model


def test_threads_that_run_a_merged_model_leave_the_base_alone():
    class Own(nn.Linear):  # a forward of its own: the weight is swapped in for the call
        def forward(self, x):
            return super().forward(x)

    for kind in (nn.Linear, Own):
        model = random_lora(nn.Sequential(kind(256, 256), nn.ReLU()), ["0"]).eval()
        parameter, before = model[0].base.weight, model[0].base.weight.detach().clone()
        mp.merge(model)
        x = torch.randn(32, 256)

        def work(model=model, x=x):
            with torch.no_grad():
                for _ in range(100):
                    model(x)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mp.unmerge(model)
        mp.remove(model)
        assert model[0].weight is parameter and torch.equal(parameter, before)


def test_computed_weights_are_not_merged_or_quantised():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    random_lora(model, "0")
    x = torch.randn(1, 8)
    before = model(x)
    for change in (
        lambda: mp.merge(model), lambda: mp.remove(model, merge=True), lambda: model[0].merged()
    ):  # fmt: skip
        with pytest.raises(ValueError, match="computes its weight"):
            change()
    assert torch.equal(model(x), before)
    mp.remove(model)
    names = mp.quantize_model(model)
    assert names == ["1"] and "computes its weight" in names.left_out["0"]
    with pytest.raises(ValueError, match="computes its weight"):
        NF4Linear.from_linear(model[0])


def test_load_state_dict_of_torch_refuses_a_merged_layer():
    model = random_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ["0"]).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mp.merge(model)
    with pytest.raises(RuntimeError, match="0 is merged"):
        model.load_state_dict(state)
    mp.unmerge(model)
    model.load_state_dict(state)


def test_merging_and_quantising_in_inference_mode():
    model = random_lora(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), ["0"]).eval()
    with torch.inference_mode():
        mp.merge(model)
        mp.quantize_model(model)
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert not any(p.is_inference() for p in model.parameters())


def test_requantising_a_model_in_float64():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    mp.inject_qlora(model, ["0", "1"], 2)
    model[1].double()
    with pytest.warns(UserWarning, match="moved them by"):
        mp.remove(model, merge=True, requantize=True)
    assert all(type(layer) is NF4Linear for layer in model)
    assert model[1].weight.dtype == torch.float64


class Gate(nn.Module):
    """A layer of somebody's own with what the protocol asks for, and nothing else."""

    enabled, scale = True, 1.0

    def __init__(self, base):
        super().__init__()
        self.base, self.gate = base, nn.Parameter(torch.ones(1))
        self.in_features, self.out_features = base.in_features, base.out_features

    def adapter_parameters(self):
        return {"gate": self.gate}

    def forward(self, x):
        return self.base(x) * self.gate


def test_a_layer_with_no_more_than_the_protocol_leaves():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    modules, x = list(model), torch.randn(2, 8)
    before = model(x)
    mp.inject(model, ["0"], Gate)
    assert mp.remove(model) == ["0"]
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("below", [True, False])
def test_such_a_layer_leaves_a_stack_and_the_others_stay(below):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    own, before = model[0], model(x)
    if below:
        mp.inject(model, ["0"], Gate)
    random_lora(model, ["0"], name="fr")
    lora = model[0]
    if not below:
        mp.inject(model, ["0"], Gate)
    assert mp.remove(model, name="default") == ["0"]
    assert model[0] is lora and lora.base is own
    assert mp.remove(model) == ["0"]
    assert model[0] is own and torch.equal(model(x), before)


def test_a_layer_without_base_or_merge_is_told_what_it_lacks():
    class Other(Gate):
        def __init__(self, base):
            super().__init__(base)
            self.inner = self._modules.pop("base")

    model = nn.Sequential(nn.Linear(8, 8))
    mp.inject(model, ["0"], Other)
    with pytest.raises(ValueError, match="remove: 0, a Other, has no `base`"):
        mp.remove(model)
    for call in (mp.merge, lambda m: mp.remove(m, merge=True)):
        with pytest.raises(ValueError, match="a layer of your own needs `base` and `merge`"):
            call(model)
