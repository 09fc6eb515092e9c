"""Several adapters on one model: names, stacks, on and off, taking one off."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear, NF4Linear
from minipeft.adapters.names import named, stacks

SIZE = 32


def randomized(model, name):
    for key, parameter in zip(
        mp.adapter_state_dict(model, name=name), mp.adapter_parameters(model, name=name),
        strict=True,
    ):  # fmt: skip
        if key.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)


def make(dtype=torch.float32, quantized=False):
    """Three adapters: over both layers, over the first, over the second."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7)).to(dtype)
    if quantized:
        mp.quantize_model(model, head=())
    mp.inject_lora(model, ["0", "2"], 3)
    mp.inject_lora(model, ["0"], 5, 15, name="fr")
    mp.inject_lora(model, ["0", "2"], 2, 4, rank_stabilized=True, name="de")
    for name in ("default", "fr", "de"):
        randomized(model, name)
    return model.eval()


def reference(model, x, on):
    """The base plus the deltas of the adapters that are on, in float64, layer by layer."""
    layers, h = named(model), x.double()
    for place in ("0", "2"):
        stack = stacks(model)[place]
        plain = stack[-1].base
        weight = plain.weight.double()
        for name in on:
            for layer in layers[name].get(place, []):
                weight = weight + layer.scale * layer.scaling * (
                    layer.lora_b.double() @ layer.lora_a.double()
                )
        h = h @ weight.T + plain.bias.double()
        h = h.relu() if place == "0" else h
    return h


# of the largest value: 33 terms, each rounded to 2**-24, in two layers
def assert_close(y, expected, factor=1e-5):
    """float32 sums of at most 33 terms."""
    assert (y.double() - expected).abs().max() <= factor * expected.abs().max()


def test_the_newest_is_outermost_and_names_are_those_of_the_plain_model():
    model = make()
    assert {p: [a.rank for a in s] for p, s in stacks(model).items()} == {"0": [2, 5, 3],
                                                                           "2": [2, 3]}  # fmt: skip
    assert {name: sorted(places) for name, places in named(model).items()} == {
        "de": ["0", "2"], "fr": ["0"], "default": ["0", "2"]
    }  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "on", [["default"], ["fr"], ["de"], ["default", "fr"], ["default", "fr", "de"]]
)
def test_those_that_are_on_add_up(on, quantized):
    model, x = make(quantized=quantized), torch.randn(9, SIZE)
    places = mp.use_adapters(model, on[0] if len(on) == 1 else on)
    assert set(places) == {place for name in on for place in named(model)[name]}
    assert_close(model(x), reference(model, x, on))


def test_an_adapter_alone_computes_bit_for_bit_as_in_a_model_of_its_own():
    model, x = make(), torch.randn(9, SIZE)
    for name, target, rank, settings in (
        ("default", ["0", "2"], 3, {}),
        ("fr", ["0"], 5, {"alpha": 15}),
        ("de", ["0", "2"], 2, {"alpha": 4, "rank_stabilized": True}),
    ):
        torch.manual_seed(1)
        alone = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7)).eval()
        mp.inject_lora(alone, target, rank, **settings)
        mp.load_adapter_state_dict(alone, mp.adapter_state_dict(model, name=name))
        mp.use_adapters(model, name)
        assert torch.equal(model(x), alone(x))


def test_gradients_of_a_stack_equal_float64():
    model, x = make(), torch.randn(9, SIZE)
    with_float64 = copy.deepcopy(model).double()
    model(x).square().sum().backward()
    reference(with_float64, x, ["default", "fr", "de"]).square().sum().backward()
    pairs = zip(mp.adapter_parameters(model), mp.adapter_parameters(with_float64), strict=True)
    for ours, expected in pairs:
        assert_close(ours.grad, expected.grad, 1e-4)  # sums over 9 rows of products of sums


def test_switching_does_not_touch_trainability():
    model = make()
    for parameter in mp.adapter_parameters(model, name="default"):
        parameter.requires_grad_(False)

    def flags():
        return [p.requires_grad for p in model.parameters()]

    before = flags()
    for names in ("fr", ["default", "de"], "default"):
        mp.use_adapters(model, names)
        assert flags() == before
    mp.inject_lora(model, ["2"], 1, name="it")
    assert not any(p.requires_grad for p in mp.adapter_parameters(model, name="default"))
    assert all(p.requires_grad for p in mp.adapter_parameters(model, name="fr"))
    enabled = {n: s["2"][0].enabled for n, s in named(model).items() if "2" in s}
    assert enabled == {"default": True, "de": False, "it": True}  # the others stay as they are


@pytest.mark.parametrize("idle", ["off", "frozen"])
def test_an_idle_adapter_does_not_move_under_weight_decay(idle):
    model, x = make().train(), torch.randn(9, SIZE)
    if idle == "off":
        mp.use_adapters(model, "de")
    else:
        for name in ("default", "fr"):
            for parameter in mp.adapter_parameters(model, name=name):
                parameter.requires_grad_(False)
    before = {n: {k: v.clone() for k, v in mp.adapter_state_dict(model, name=n).items()}
              for n in ("default", "fr", "de")}  # fmt: skip
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, state in before.items():
        for key, value in mp.adapter_state_dict(model, name=name).items():
            assert torch.equal(value, state[key]) == (name != "de")


def test_disable_adapters_nests_and_survives_exceptions():
    model, x = make(), torch.randn(9, SIZE)
    plain = mp.base_state_dict(model)
    base = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7)).eval()
    base.load_state_dict(plain)
    mp.use_adapters(model, "fr")
    expected = model(x)
    with mp.disable_adapters(model):
        with mp.disable_adapters(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))  # the inner context gave back what it found
    assert torch.equal(model(x), expected)
    with pytest.raises(KeyError, match="stop"), mp.disable_adapters(model):
        raise KeyError("stop")
    assert torch.equal(model(x), expected)
    assert [a.enabled for a in stacks(model)["0"]] == [False, True, False]


def test_scaling_one_of_several():
    model, x = make(), torch.randn(9, SIZE)
    whole = reference(model, x, ["default", "fr", "de"])
    mp.scale_adapters(model, 0.5, name="fr")
    assert [a.scale for a in stacks(model)["0"]] == [1.0, 0.5, 1.0]
    assert_close(model(x), reference(model, x, ["default", "fr", "de"]))
    mp.scale_adapters(model, 0.0, name="fr")
    assert_close(model(x), reference(model, x, ["default", "de"]))
    mp.scale_adapters(model, 1.0)
    assert_close(model(x), whole)
    with pytest.raises(ValueError, match="no adapter 'es'"):
        mp.scale_adapters(model, 2.0, name="es")


@pytest.mark.parametrize("gone", ["default", "fr", "de"])  # bottom, middle and top of the stack
def test_one_adapter_can_be_taken_off(gone):
    model, x = make(), torch.randn(9, SIZE)
    rest = [name for name in ("default", "fr", "de") if name != gone]
    layers = {name: [a for s in named(model)[name].values() for a in s] for name in rest}
    mp.use_adapters(model, rest)
    expected, places = model(x), list(named(model)[gone])
    assert mp.remove(model, name=gone) == places
    assert torch.equal(model(x), expected)
    assert sorted(named(model)) == sorted(rest)
    for name in rest:  # the very layers
        assert [id(a) for s in named(model)[name].values() for a in s] == [*map(id, layers[name])]
    with pytest.raises(ValueError, match=f"no adapter {gone!r}"):
        mp.use_adapters(model, gone)
    mp.inject_lora(
        model, ["0"], 1, name=gone
    ) if gone != "default" else None  # the name is free again
    mp.remove(model)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_remove_restores_the_very_modules(one_by_one):
    model = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7))
    before = [*model]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    mp.inject_lora(model, ["0", "2"], 3)
    mp.inject_lora(model, ["0"], 5, name="fr")
    mp.inject_lora(model, ["0", "2"], 2, name="de")
    if one_by_one:
        for name in ("fr", "default", "de"):
            mp.remove(model, name=name)
    else:
        mp.remove(model)
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert named(model) == {}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("on", [["default", "fr", "de"], ["default", "de"], ["fr"]])
def test_a_merged_stack_equals_the_unmerged_one(on, quantized, capsys):
    model, x = make(quantized=quantized), torch.randn(50, SIZE)
    mp.use_adapters(model, on)
    expected = model(x)
    mp.merge(model)
    difference = ((model(x) - expected).abs().max() / expected.abs().max()).item()
    with capsys.disabled():
        print(f"\nmerged stack of {on}, NF4={quantized}: {difference:.1e} relative")
    # float32: the product is rounded into the weight, two of them
    assert difference <= 1e-5
    with pytest.raises(ValueError, match="is merged"):
        mp.use_adapters(model, "fr")
    mp.unmerge(model)
    assert torch.equal(model(x), expected)
    mp.remove(model, merge=True)
    assert type(model[0]) is nn.Linear
    # the same
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_bf16_merged_weight_of_a_stack_is_rounded_once():
    model = make(torch.bfloat16)
    for on in (["default", "fr", "de"], ["fr", "de"], ["default"]):
        mp.use_adapters(model, on)
        mp.merge(model)
        for place in ("0", "2"):
            stack = stacks(model)[place]
            exact = stack[-1].base.weight.float()
            for layer in reversed(stack):  # float32 sums in the order of the stack
                if layer.enabled:
                    exact = exact + layer.scaling * (layer.lora_b @ layer.lora_a)
            merged = [layer.merged_module for layer in stack if layer.merged_module is not None]
            if any(layer.enabled for layer in stack):
                assert torch.equal(merged[0].weight, exact.bfloat16())
            else:
                assert merged == []
        mp.unmerge(model)


def test_a_shared_module_is_stacked_once_under_both_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(SIZE, SIZE)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    model, x = Shared().eval(), torch.randn(9, SIZE)
    plain, expected = model.a, model(x)
    mp.inject_lora(model, ["a", "b"], 3)
    mp.inject_lora(model, ["a"], 2, name="fr")
    randomized(model, "fr")
    assert model.a is model.b
    assert len(stacks(model)) == 1
    assert list(named(model)["fr"]) == ["a"]
    assert_close(model.a(x), x.double() @ model.a.weight.double().T + plain.bias.double())
    mp.remove(model, name="default")
    assert model.a is model.b
    assert model.a.base is plain
    mp.remove(model)
    assert model.a is model.b is plain
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_names_of_their_own_layers(again):
    model, x = make(), torch.randn(9, SIZE)
    expected = {}
    for name in ("default", "fr", "de"):
        mp.use_adapters(model, name)
        expected[name] = model(x)
    twin = again(model)
    assert named(twin).keys() == named(model).keys()
    for name in expected:
        mp.use_adapters(twin, name)
        assert torch.equal(twin(x), expected[name])
    mp.remove(twin, name="fr")
    assert "fr" in named(model)  # the original keeps its own
    mp.use_adapters(model, "fr")
    assert torch.equal(model(x), expected["fr"])


def test_named_state_dicts_have_the_names_of_the_plain_model():
    model = make()
    assert list(mp.adapter_state_dict(model, name="fr")) == ["0.lora_a", "0.lora_b"]
    others = {n: {k: v.clone() for k, v in mp.adapter_state_dict(model, name=n).items()}
              for n in ("default", "de")}  # fmt: skip
    state = {k: torch.ones_like(v) for k, v in mp.adapter_state_dict(model, name="fr").items()}
    assert mp.load_adapter_state_dict(model, state, name="fr") == ([], [])
    assert all((v == 1).all() for v in mp.adapter_state_dict(model, name="fr").values())
    for name, before in others.items():
        assert all(
            torch.equal(v, before[k])
            for k, v in mp.adapter_state_dict(model, name=name).items()
        )  # fmt: skip
    with pytest.raises(ValueError, match="has shape"):
        mp.load_adapter_state_dict(model, state, name="default", strict=False)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_base_state_dict_is_the_plain_models(quantized):
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7))
    if quantized:
        mp.quantize_model(plain, head=())
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    model = copy.deepcopy(plain)
    mp.inject_lora(model, ["0", "2"], 3)
    mp.inject_lora(model, ["0"], 5, name="fr")
    mp.inject_lora(model, ["0", "2"], 2, name="de")
    state = mp.base_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    plain.load_state_dict(state)


def test_a_whole_state_dict_makes_the_round_trip():
    model, other, x = make(), make(), torch.randn(9, SIZE)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_names_given_to_a_part_hold_in_the_whole():
    whole = nn.ModuleDict({"left": nn.Sequential(nn.Linear(4, 4)),
                           "right": nn.Sequential(nn.Linear(4, 4))})  # fmt: skip
    for side in ("left", "right"):
        mp.inject_lora(whole[side], ["0"], 2, name="fr")
    assert sorted(named(whole)["fr"]) == ["left.0", "right.0"]
    mp.remove(whole, name="fr")
    assert named(whole) == {}
    assert named(whole["left"]) == {}


def test_autocast_and_bf16_stacks():
    model, x = make(), torch.randn(9, SIZE)
    expected = reference(model, x, ["default", "fr", "de"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    # two layers, in each a rounding to bf16 (2**-9) of the input, of x A^T, of the output
    assert_close(y, expected, 2 * 4 * 2.0**-8)


def test_bad_input_changes_nothing():
    model, x = make(), torch.randn(9, SIZE)
    before, structure = model(x), repr(model)
    for error, match, call in (
        (ValueError, "already", lambda: mp.inject_lora(model, ["0"], 1, name="fr")),
        (ValueError, "already", lambda: mp.inject_lora(model, ["0"], 1, name="default")),
        (ValueError, "cannot name", lambda: mp.inject_lora(model, ["0"], 1, name="../x")),
        (ValueError, "cannot name", lambda: mp.inject_lora(model, ["0"], 1, name="")),
        (ValueError, "match no module", lambda: mp.inject_lora(model, ["7"], 1, name="it")),
        (ValueError, "rank=0", lambda: mp.inject_lora(model, ["0"], 0, name="it")),
        (
            ValueError,
            "rank=-1",
            lambda: mp.inject_lora(model, ["0", "2"], {"0": 1, "2": -1}, name="it"),
        ),
        (ValueError, "no adapter 'it'", lambda: mp.use_adapters(model, ["fr", "it"])),
        (ValueError, "no name", lambda: mp.use_adapters(model, [])),
        (ValueError, "names, or rows", lambda: mp.use_adapters(model)),
        (ValueError, "not both", lambda: mp.use_adapters(model, "fr", rows=["fr"])),
        (ValueError, "no adapter 'it'", lambda: mp.remove(model, name="it")),
        (ValueError, "merging 'fr' alone", lambda: mp.remove(model, name="fr", merge=True)),
        (ValueError, "no adapter 'it'", lambda: mp.adapter_state_dict(model, name="it")),
        (ValueError, "no adapter", lambda: mp.use_adapters(nn.Sequential(nn.Linear(2, 2)), "fr")),
    ):
        with pytest.raises(error, match=match):
            call()
        assert repr(model) == structure
        assert torch.equal(model(x), before)
    assert all(p.requires_grad for p in mp.adapter_parameters(model))


def test_a_merged_model_takes_no_further_adapter():
    model = make()
    mp.merge(model)
    for call in (
        lambda: mp.inject_lora(model, ["0"], 1, name="it"),
        lambda: mp.remove(model, name="fr"),
        lambda: mp.scale_adapters(model, 0.5, name="fr"),
        lambda: mp.load_adapter_state_dict(model, {}, name="fr", strict=False),
    ):
        with pytest.raises(ValueError, match=r"merged; call minipeft\.unmerge"):
            call()
    assert sorted(named(model)) == ["de", "default", "fr"]


def test_layers_stacked_by_hand_share_a_name_but_no_state_dict():
    model = nn.Sequential(LoRALinear(LoRALinear(nn.Linear(4, 4), 2), 3))
    assert [layer.rank for layer in named(model)["default"]["0"]] == [3, 2]
    with pytest.raises(ValueError, match="two layers over '0'"):
        mp.adapter_state_dict(model, name="default")
    assert len(mp.adapter_state_dict(model)) == 4
    mp.remove(model, name="default")
    assert type(model[0]) is nn.Linear


def test_stacks_agree_with_peft(capsys):
    peft = pytest.importorskip("peft")
    model, x = make(), torch.randn(9, SIZE)
    torch.manual_seed(1)
    theirs = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7)).eval()
    settings = {"default": (["0", "2"], 3, 3, False), "fr": (["0"], 5, 15, False),
                "de": (["0", "2"], 2, 4, True)}  # fmt: skip
    for name, (targets, rank, alpha, stabilized) in settings.items():
        config = peft.LoraConfig(
            target_modules=targets, r=rank, lora_alpha=alpha, use_rslora=stabilized
        )
        if name == "default":
            theirs = peft.get_peft_model(theirs, config)
        else:
            theirs.add_adapter(name, config)
        for place, stack in named(model)[name].items():
            layer = theirs.base_model.model[int(place)]
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(stack[0].lora_a)
                layer.lora_B[name].weight.copy_(stack[0].lora_b)
    for on in (["default"], ["fr"], ["default", "fr", "de"]):
        mp.use_adapters(model, on)
        theirs.base_model.set_adapter(on)
        y, expected = model(x), theirs(x)
        difference = ((y - expected).abs().max() / expected.abs().max()).item()
        with capsys.disabled():
            print(f"\nstack of {on} against PEFT: {difference:.1e} relative")
        assert difference <= 1e-6  # the same products, added in one step instead of two


def test_nf4_bases_stay_packed_under_a_stack():
    model = make(quantized=True)
    assert isinstance(stacks(model)["0"][-1].base, NF4Linear)
    mp.remove(model, name="de")
    mp.remove(model)
    assert isinstance(model[0], NF4Linear)


def twin_with(rank, alpha, targets):
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7))
    mp.inject_lora(other, targets, rank, alpha)
    randomized(other, "default")
    return other


@pytest.mark.parametrize(("rank", "targets"), [(3, ["0", "2"]), (1, ["0", "2"]), (2, ["2"])])
def test_swapped_factors_compute_what_the_other_adapter_does(rank, targets):
    model, other, x = make(), twin_with(rank, 7, targets), torch.randn(9, SIZE)
    addresses = [p.data_ptr() for p in model.parameters()]
    plain = nn.Sequential(nn.Linear(SIZE, 33), nn.ReLU(), nn.Linear(33, 7)).eval()
    plain.load_state_dict(mp.base_state_dict(model))
    mp.inject_lora(plain, targets, rank, 7)
    mp.load_adapter_state_dict(plain, mp.adapter_state_dict(other))
    assert mp.replace_adapter(model, "default", other) == ["0", "2"]
    mp.use_adapters(model, "default")
    assert_close(model(x), plain(x).double())
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert all(p.requires_grad for p in mp.adapter_parameters(model))


def test_bad_factors_are_not_swapped_in():
    model, x = make(), torch.randn(9, SIZE)
    before = model(x)
    ok = (torch.ones(3, SIZE), torch.ones(33, 3), 1.0)
    for name, other, match in (
        ("fr", twin_with(2, 2, ["2"]), "no layer over"),
        ("default", twin_with(4, 4, ["0"]), "at most 3"),
        ("default", {"0": ok, "2": (torch.ones(3, 32), torch.ones(7, 3), 1.0)}, "2 has factors"),
        ("default", {"0": ok, "2": (torch.ones(3, 33), torch.ones(7, 2), 1.0)}, "2 has factors"),
        ("it", twin_with(2, 2, ["2"]), "no adapter 'it'"),
        ("fr", nn.Sequential(nn.Linear(2, 2)), "no adapter 'default'"),
    ):
        with pytest.raises(ValueError, match=match):
            mp.replace_adapter(model, name, other)
        assert torch.equal(model(x), before)
    mp.merge(model)
    with pytest.raises(ValueError, match="is merged"):
        mp.replace_adapter(model, "default", {"0": ok})


def test_swapping_an_adapter_for_itself_changes_nothing():
    model, x = make(), torch.randn(9, SIZE)
    before = model(x)
    mp.replace_adapter(model, "fr", model, other_name="fr")
    assert torch.equal(model(x), before)


def test_nothing_is_swapped_where_a_start_is_subtracted():
    """Zero factors would not be a zero product there."""
    model, x = nn.Sequential(nn.Linear(SIZE, SIZE)), torch.randn(9, SIZE)
    mp.inject_lora(model, ["0"], 2, init=mp.starts.pissa())
    before = model(x)
    with pytest.raises(ValueError, match="subtracts its start"):
        mp.replace_adapter(model, "default", {})
    assert torch.equal(model(x), before)


def test_a_vector_is_no_factor():
    model = make()
    with pytest.raises(ValueError, match="0 has factors"):
        mp.replace_adapter(model, "fr", {"0": (torch.ones(3), torch.ones(33, 3), 1.0)})
