"""Defects that were there once, each with the shortest script that showed it."""

import json
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear


def two_names() -> nn.Module:
    """One layer under two names."""
    model = nn.Module()
    model.a = model.b = nn.Linear(4, 4)
    return model


def random_lora(model: nn.Module, target, rank: int = 2, **lora) -> nn.Module:
    def init(layer):
        nn.init.normal_(layer.lora_a)
        nn.init.normal_(layer.lora_b)

    mp.inject_lora(model, target, rank, init=init, **lora)
    return model


def test_wrappers_are_in_the_mode_of_what_they_wrap():
    model = random_lora(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), ["0"], dropout=0.5)
    x = torch.randn(2, 8)
    assert not model[0].training and torch.equal(model(x), model(x))
    mp.merge(model)
    model(x)
    mp.remove(model)
    mp.quantize_model(model)
    assert not model[0].training


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_default_dtype_does_not_change_nf4(plain_python, dtype):
    script = f"""
import torch
torch.set_default_dtype(torch.{dtype})
import minipeft
w = torch.randn(64, 256, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
packed, absmax = minipeft.quantize_nf4(w)
decoded = minipeft.dequantize_nf4(packed, absmax, w.shape)
code, scale, offset = minipeft.quantize_absmax(absmax)
print(minipeft.NF4_CODEBOOK, packed.sum().item(), decoded.double().sum().item(),
      code.sum().item(), scale.sum().item(), offset.item())
"""
    assert plain_python(script) == plain_python(script.replace(dtype, "float32"))


class Gated(nn.Linear):
    """A linear layer that holds another."""

    def __init__(self):
        super().__init__(8, 8)
        self.gate = nn.Linear(8, 8)

    def forward(self, x):
        return super().forward(x) * self.gate(x).sigmoid()


def test_a_target_inside_another_is_refused_and_nothing_changes():
    model = nn.Sequential(Gated(), nn.ReLU())
    before = list(model.named_modules())
    for change in (
        lambda: mp.inject_lora(model, "all-linear", 2),
        lambda: mp.quantize_model(model, also=(Gated,)),
        lambda: mp.inject_qlora(model, "all-linear", 2, also=(Gated,)),
    ):
        with pytest.raises(ValueError, match=r"\['0\.gate'\] lie inside other targets"):
            change()
    assert list(model.named_modules()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert mp.inject_lora(model, "all-linear", 2, exclude=["0.gate"]) == ["0"]


def test_a_shared_layer_is_wrapped_under_all_its_names():
    model = random_lora(two_names(), ["a"])
    assert model.a is model.b
    assert sorted(mp.base_state_dict(model)) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    x = torch.randn(1, 4)
    before = model.b(x)
    mp.remove(model, merge=True)
    assert model.a is model.b
    torch.testing.assert_close(model.b(x), before, rtol=1e-5, atol=1e-6)  # float32


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


def write_adapter(folder, tensor=None, **fields):
    """A valid adapter of one layer but for `fields` and `tensor`."""
    name = "base_model.model.query_projection"
    a = torch.randn(2, 8) if tensor is None else tensor
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": torch.zeros(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["query_projection"]} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"(?i)foo": 4}}, "no regular expression"),
        ({"rank_pattern": {"a{99999999999}": 4}}, "no regular expression"),
        ({"target_modules": "(" * 3000 + ")" * 3000}, "no regular expression"),
        ({"target_modules": r"((\w|\w)+)+X"}, "takes more than"),
        ({"lora_alpha": 10**400}, "lora_alpha"), ({"r": 10**400}, "r is"),
        ({"use_rslora": 1}, "use_rslora"), ({"layers_to_transform": 0}, "layers_to_transform"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_hostile_configurations(tmp_path, monkeypatch, fields, message):
    from minipeft.io.peft import patterns

    monkeypatch.setattr(patterns, "SECONDS", 2)
    model = nn.ModuleDict({"query_projection": nn.Linear(8, 8)})
    write_adapter(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        mp.load_peft(model, tmp_path)
    assert type(model["query_projection"]) is nn.Linear


def test_adapters_in_eight_bits_are_refused(tmp_path):
    write_adapter(tmp_path, torch.randn(2, 8).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        mp.load_peft(nn.ModuleDict({"query_projection": nn.Linear(8, 8)}), tmp_path)


def test_a_float32_island_stays_float32_under_autocast():
    class Island(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    layer, x = LoRALinear(Island(8, 8), 2), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.float32
        packed = NF4Linear.from_linear(nn.Linear(64, 8))
        assert packed(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("double_quant", [False, True])
def test_assigning_a_state_dict_to_a_layer_on_the_meta_device(double_quant):
    layer = NF4Linear.from_linear(nn.Linear(64, 8), double_quant=double_quant)
    other = NF4Linear(64, 8, double_quant=double_quant, device="meta")
    assert other(torch.empty(2, 64, device="meta")).shape == (2, 8)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))


def test_models_without_values_are_refused(tmp_path):
    with torch.device("meta"):
        model = nn.ModuleDict({"query_projection": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="meta device"):
        mp.quantize_model(model)
    write_adapter(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        mp.load_peft(model, tmp_path)
    assert type(model["query_projection"]) is nn.Linear
    mp.inject_lora(model, ["query_projection"], 2)
    state = {n: torch.zeros_like(t, device="cpu") for n, t in mp.adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match="meta device"):
        mp.load_adapter_state_dict(model, state)


def test_type_casts_no_codes():
    layer, x = NF4Linear.from_linear(nn.Linear(64, 8)), torch.randn(2, 64)
    before = layer.dequantize(torch.float32)
    layer.type(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.dequantize(torch.float32), before)
    layer(x)


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


def test_save_pretrained_is_the_models_own_again_after_remove():
    class Saves(nn.Sequential):
        def save_pretrained(self, path, model_name=None):
            return path, model_name

    model = Saves(nn.Linear(8, 8))
    mp.inject_lora(model, ["0"], 2)
    mp.remove(model)
    assert model.save_pretrained(path="here", model_name="x") == ("here", "x")


def test_hooks_survive_quantisation():
    model, calls = nn.Sequential(nn.Linear(64, 8)), []
    handle = model[0].register_forward_hook(lambda *a: calls.append(1))
    mp.quantize_model(model)
    model(torch.randn(1, 64))
    handle.remove()
    model(torch.randn(1, 64))
    assert calls == [1]


def test_the_head_of_a_model_inside_another():
    class Language(nn.Module):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self):
            super().__init__()
            self.norm, self.body, self.lm_head = (nn.Linear(64, 64) for _ in range(3))

        def get_output_embeddings(self):
            return self.lm_head

    model = nn.ModuleDict({"language": Language(), "projector": nn.Linear(64, 64)})
    assert mp.inject_qlora(model, "all-linear", 2) == [
        "language.norm", "language.body", "projector"
    ]  # fmt: skip
    assert type(model["language"].lm_head) is nn.Linear
    assert type(model["language"].norm.base) is nn.Linear


def test_small_things():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert mp.inject_qlora(model, (name for name in ["0"]), 2) == ["0"]
    with pytest.raises(ValueError, match="no regular expression"):
        mp.inject_lora(model, ["1"], {"[": 2})
    linear = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="never mind"):
        LoRALinear(linear, 2, init=lambda layer: (_ for _ in ()).throw(RuntimeError("never mind")))
    assert linear.weight.requires_grad
    with pytest.raises(ValueError, match="itself"):
        mp.save_peft(LoRALinear(linear, 2), "nowhere")
