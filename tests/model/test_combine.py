"""One adapter from several: against dense float64 sums, the papers' rules, and PEFT."""

import copy
import math

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import NF4Linear
from minipeft.adapters.names import named

NAMES = ["default", "fr", "de"]
WEIGHTS = [0.7, -0.4, 1.5]


class Model(nn.Module):
    """An embedding, convolutions with and without groups, linear layers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(65, 24)
        self.mix = nn.Conv1d(24, 24, 3, padding=1)
        self.grouped = nn.Conv1d(24, 24, 3, padding=1, groups=2)
        self.up, self.down = nn.Linear(24, 63), nn.Linear(63, 33)

    def forward(self, tokens):
        x = self.table(tokens).transpose(1, 2)
        x = self.grouped(self.mix(x)).transpose(1, 2)
        return self.down(self.up(x).relu())


def randomize(model):
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[2] in ("lora_a", "lora_b"):
            nn.init.normal_(parameter, std=0.3)


def make(targets=("up", "down"), *, ranks=(2, 4, 6), dtype=torch.float32, quantized=False):
    """Three adapters of different ranks, scalings, one rank-stabilised, one at half strength."""
    torch.manual_seed(6)
    model = Model().eval()
    if quantized:
        model.up = NF4Linear.from_linear(model.up)
    mp.inject_lora(model, list(targets), ranks[0], 6, dtype=dtype)
    mp.inject_lora(model, list(targets), ranks[1], 3, dtype=dtype, name="fr")
    mp.inject_lora(model, list(targets), ranks[2], 5, rank_stabilized=True, dtype=dtype, name="de")
    randomize(model)
    mp.scale_adapters(model, 0.5, name="fr")
    return model


def dense_deltas(model, place):
    """Each adapter's delta in float64, from its factors by a loop over the rank."""
    deltas = []
    for name in NAMES:
        layers = named(model)[name].get(place, [])
        if not layers:
            continue
        (layer,) = layers
        a, b = (t.detach().double() for t in (layer.lora_a, layer.lora_b))
        groups = getattr(layer, "groups", 1) if a.dim() > 2 else 1
        rank, out = len(a) // groups, len(b) // groups
        delta = torch.zeros(len(b), *a.shape[1:], dtype=torch.float64)
        for row in range(len(b)):
            for k in range(rank):
                delta[row] += b[row, k].flatten() * a[row // out * rank + k]
        stabilized = math.sqrt(layer.rank) if layer.rank_stabilized else layer.rank
        deltas.append(layer.alpha / stabilized * layer.scale * delta)
    return deltas


def weighted(deltas, weights=WEIGHTS):
    return sum(w * delta for w, delta in zip(weights, deltas, strict=True))


def relative(delta, expected):
    return ((delta.double() - expected).norm() / expected.norm()).item()


def truncated(matrix, rank):
    """The best approximation by a rank (Eckart and Young 1936)."""
    u, s, v = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view(matrix.shape)


def combined(model, place, name="new"):
    (layer,) = named(model)[name][place]
    assert layer.scaling == 1
    return layer.delta().detach()


@pytest.mark.parametrize(
    ("places", "quantized"),
    [(("up", "down"), False), (("up", "down"), True), (("table", "mix", "grouped"), False)],
)
def test_cat_is_the_weighted_sum(places, quantized, capsys):
    model = make(places, quantized=quantized)
    expected = {place: weighted(dense_deltas(model, place)) for place in places}
    assert mp.combine_adapters(model, NAMES, WEIGHTS, new_name="new") == list(places)
    errors = [relative(combined(model, place), expected[place]) for place in places]
    with capsys.disabled():
        print(f"\ncat over {places} against the dense sum: {max(errors):.1e}")
    assert max(errors) <= 1e-6  # float32 products of factors
    assert {named(model)["new"][place][0].rank for place in places} == {12}


def test_the_combination_computes_what_the_scaled_sources_do():
    """Weights of 1 and all sources on: the same function, with one layer instead of three."""
    model, tokens = make(("table", "mix", "grouped", "up", "down")), torch.randint(65, (3, 7))
    expected = model(tokens)
    mp.combine_adapters(model, NAMES, [1.0] * 3, new_name="new")
    assert relative(model(tokens), expected.double()) <= 1e-5  # float32 sums in another order
    mp.use_adapters(model, NAMES)
    assert torch.equal(model(tokens), expected)


def test_the_new_adapter_is_on_and_trainable_and_its_sources_off():
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {id(p): p.requires_grad for p in model.parameters()}
    mp.combine_adapters(model, ["default", "de"], [1.0, 1.0], new_name="new")
    on = {n: [a.enabled for s in p.values() for a in s] for n, p in named(model).items()}
    assert on["new"] == [True, True]
    assert on["default"] == on["de"] == [False, False]
    assert all(p.requires_grad for p in mp.adapter_parameters(model, name="new"))
    assert all(p.requires_grad == flags.get(id(p), True) for p in model.parameters())
    state = mp.base_state_dict(model)
    assert all(torch.equal(state[key], before[f"{key.rpartition('.')[0]}{'.base' * 3}"
                                              f".{key.rpartition('.')[2]}"])
               for key in state if key.startswith(("up", "down")))  # fmt: skip
    mp.remove(model, name="new")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rank", [1, 5, 12, 40])
def test_svd_is_the_best_approximation_of_a_rank(rank, capsys):
    places = ("table", "mix", "up", "down")
    model = make(places)
    sums = {place: weighted(dense_deltas(model, place)) for place in places}
    mp.combine_adapters(model, NAMES, WEIGHTS, "svd", new_name="new", rank=rank)
    errors = [relative(combined(model, p), truncated(sums[p], rank)) for p in places]
    with capsys.disabled():
        print(f"\nsvd by rank {rank} against the dense one: {max(errors):.1e}")
    assert max(errors) <= 1e-6  # rounded to float32 at the end
    layers = [named(model)["new"][place][0] for place in places]
    assert {layer.rank for layer in layers} == {min(rank, 12)}  # the sum has no more
    for layer in layers:  # each factor gets half of every singular value
        a, b = layer.lora_a.flatten(1).norm(dim=1), layer.lora_b.flatten(1).norm(dim=0)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # float32; the smallest are small


def test_svd_keeps_the_largest_rank_unless_told_otherwise():
    model = make()
    mp.combine_adapters(model, NAMES, WEIGHTS, "svd", new_name="new")
    assert {s[0].rank for s in named(model)["new"].values()} == {6}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_subtracted_start_is_combined_as_well(method):
    model = Model().eval()
    mp.inject_lora(model, ["up"], 2, init=mp.starts.pissa())
    mp.inject_lora(model, ["up"], 3, name="fr")
    with torch.no_grad():
        for layer in (model.up, model.up.base):
            layer.lora_b.add_(torch.randn_like(layer.lora_b) * 0.1)
    expected = (model.up.delta() + model.up.base.delta()).detach().double()
    rank = {"rank": 7} if method == "svd" else {}  # 3 and twice 2
    mp.combine_adapters(model, ["default", "fr"], [1.0, 1.0], method, new_name="new", **rank)
    assert relative(combined(model, "up"), expected) <= 1e-5  # W's part cancels in float32


def test_linear_adds_factors_with_the_products_across():
    model = make(ranks=(4, 4, 4))
    expected = {}
    for place in ("up", "down"):
        a, b = 0, 0
        for name, weight in zip(NAMES, WEIGHTS, strict=True):
            (layer,) = named(model)[name][place]
            w = weight * layer.scaling * layer.scale
            a = a + abs(w) ** 0.5 * layer.lora_a.double()
            b = b + math.copysign(abs(w) ** 0.5, w) * layer.lora_b.double()
        expected[place] = (b @ a).detach()
    sums = {place: weighted(dense_deltas(model, place)) for place in expected}
    mp.combine_adapters(model, NAMES, WEIGHTS, "linear", new_name="new")
    for place, value in expected.items():
        assert relative(combined(model, place), value) <= 1e-6  # float32 sums of three
        assert relative(combined(model, place), sums[place]) > 0.1  # no weighted sum


@pytest.mark.parametrize("weight", [2.0, -0.5])
def test_linear_of_one_adapter_is_exact(weight):
    model = make()
    expected = {p: weight * dense_deltas(model, p)[2] for p in ("up", "down")}
    mp.combine_adapters(model, ["de"], [weight], "linear", new_name="new")
    for place, value in expected.items():
        assert relative(combined(model, place), value) <= 1e-6  # float32


def ties_by_hand(deltas, weights, density):
    """Yadav et al. 2023, entry by entry: trim, elect the sign of the larger mass, average."""
    trimmed = []
    for weight, delta in zip(weights, deltas, strict=True):
        keep = round(density * delta.numel())
        smallest = delta.abs().flatten().sort(descending=True).values[keep - 1]
        trimmed.append(weight * torch.where(delta.abs() >= smallest, delta, 0.0))
    result = torch.zeros_like(deltas[0])
    for index in range(result.numel()):
        values = [t.view(-1)[index].item() for t in trimmed]
        sign = math.copysign(1.0, sum(values)) if sum(values) else 0.0
        agreeing = [v for v in values if v * sign > 0]
        result.view(-1)[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_the_papers_rule_then_svd(density):
    model = make(("mix", "up"))
    expected = {p: ties_by_hand(dense_deltas(model, p), WEIGHTS, density) for p in ("mix", "up")}
    for name, rank in (("full", 24), ("low", 3)):
        mp.use_adapters(model, NAMES)
        mp.combine_adapters(
            model, NAMES, WEIGHTS, "ties", new_name=name, density=density, rank=rank
        )
        for place, value in expected.items():
            # float32 deltas; no two of these are close enough to change places in the order
            assert relative(combined(model, place, name), truncated(value, rank)) <= 1e-5


def test_dare_drops_at_random_and_scales_the_rest_up():
    """Yu et al. 2023: a share is dropped, the expectation stays."""
    model = make(("up",))
    (delta, *_) = dense_deltas(model, "up")
    mean, count = torch.zeros_like(delta), 200
    for seed in range(count):
        twin = copy.deepcopy(model)
        mp.combine_adapters(
            twin, ["default"], [1.0], "dare", new_name="new", density=0.4, rank=24, seed=seed
        )
        found = combined(twin, "up").double()
        kept = found.abs() > 0.5 * delta.abs()
        if seed == 0:
            # one binomial draw of 24 * 63: five standard deviations of its share
            assert abs(kept.double().mean() - 0.4) < 5 * (0.24 / delta.numel()) ** 0.5
            expected = torch.where(kept, delta / 0.4, 0.0)
            assert relative(found, expected) <= 1e-5  # float32, by way of an svd of full rank
        mean += found / count
    # each entry's mean of 200 deviates by delta * sqrt(0.6 / 0.4 / 200) = 0.087 delta
    assert abs(relative(mean, delta) - 0.087) < 0.02


def test_dare_of_several_adds_up_and_is_seeded():
    model = make(("up",))
    expected = weighted(dense_deltas(model, "up"))
    results = []
    for density, seed in ((1.0, 0), (0.5, 1), (0.5, 1), (0.5, 2)):
        twin = copy.deepcopy(model)
        mp.combine_adapters(
            twin, NAMES, WEIGHTS, "dare", new_name="new", density=density, seed=seed, rank=24
        )
        results.append(combined(twin, "up"))
    assert relative(results[0], expected) <= 1e-5  # float32; nothing is dropped
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[1], results[3])


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "dare"])
def test_layers_that_some_lack_raise_or_count_as_zero(method):
    model = make(("up", "down"), ranks=(2, 2, 2))
    mp.inject_lora(model, ["up"], 2, name="es")
    randomize(model)
    structure = repr(model)
    with pytest.raises(ValueError, match=r"\['es'\] have no layer over 'down' \(1 modules"):
        mp.combine_adapters(model, ["de", "es"], [1.0, 1.0], method, new_name="new")
    assert repr(model) == structure
    down = dense_deltas(model, "down")[2]
    settings = {} if method in ("cat", "linear") else {"rank": 4, "density": 1.0}
    mp.combine_adapters(
        model, ["de", "es"], [2.0, 1.0], method, new_name="new", missing="zero", **settings
    )
    assert sorted(named(model)["new"]) == ["down", "up"]
    assert relative(combined(model, "down"), 2 * down) <= 1e-5  # float32


def test_a_shared_module_gets_one_layer():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    mp.inject_lora(model, ["a", "b"], 2)
    mp.inject_lora(model, ["a"], 2, name="fr")
    mp.combine_adapters(model, ["default", "fr"], [1.0, 1.0], new_name="new")
    assert model["a"] is model["b"]
    assert model["a"].rank == 4


def test_bad_input_raises_and_changes_nothing():
    model = make(ranks=(2, 4, 6))
    mp.inject_lora(model, ["up"], 2, dora=True, name="dora")
    mp.inject_lora(model, ["grouped"], 2, name="grouped")
    mp.inject_lora(model, ["grouped"], 2, name="grouped2")
    structure = repr(model)
    two = (["default", "fr"], [1.0, 1.0])
    for match, names, weights, settings in (
        ("method='average'", *two, {"method": "average"}),
        ("no adapter 'it'", ["default", "it"], [1.0, 1.0], {}),
        ("expected a weight for each", ["default", "fr"], [1.0], {}),
        ("different names", ["fr", "fr"], [1.0, 1.0], {}),
        ("expected a weight for each", [], [], {}),
        ("finite", ["default", "fr"], [1.0, math.nan], {}),
        ("already", *two, {"new_name": "de"}),
        ("cannot name", *two, {"new_name": "a/b"}),
        ("rank=3 with 'cat'", *two, {"rank": 3}),
        ("rank=0", *two, {"method": "svd", "rank": 0}),
        ("density=0", *two, {"method": "ties", "density": 0.0}),
        ("density=1.5", *two, {"method": "dare", "density": 1.5}),
        ("missing='skip'", *two, {"missing": "skip"}),
        ("'linear' needs equal ranks", *two, {"method": "linear"}),
        (r"'dora' has \['DoRALinear'\] over 'up'", ["dora"], [1.0], {}),
        ("grouped is a convolution in groups", ["grouped", "grouped2"], [1.0, 1.0],
         {"method": "svd"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            mp.combine_adapters(model, names, weights, **{"new_name": "new", **settings})
        assert repr(model) == structure
    assert all(p.requires_grad for p in mp.adapter_parameters(model))
    mp.use_adapters(model, "fr")
    mp.merge(model)
    with pytest.raises(ValueError, match="is merged"):
        mp.combine_adapters(model, *two, new_name="new")


def with_peft(peft, model, *, stabilized):
    """The linear layers of the model in PEFT, with the same factors in adapters x and y."""
    theirs = nn.ModuleDict({"up": nn.Linear(24, 63), "down": nn.Linear(63, 33)})
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]}
    config = peft.LoraConfig(use_rslora=stabilized, **settings)
    wrapped = peft.get_peft_model(theirs, config, adapter_name="x")
    wrapped.add_adapter("y", config)
    for name, places in named(model).items():
        for place, (layer,) in places.items():
            their_layer = wrapped.base_model.model[place]
            with torch.no_grad():
                their_layer.lora_A[name].weight.copy_(layer.lora_a)
                their_layer.lora_B[name].weight.copy_(layer.lora_b)
    return wrapped


def two_of_rank_4(*, stabilized):
    torch.manual_seed(7)
    model = Model()
    for name in ("x", "y"):
        mp.inject_lora(model, ["up", "down"], 4, 6, rank_stabilized=stabilized, name=name)
    randomize(model)
    return model


CASES = [("cat", "cat", {}), ("svd", "svd", {"rank": 4}), ("linear", "linear", {}),
         ("ties", "ties_svd", {"rank": 24})]  # fmt: skip


THIRD = 1 / 3  # a whole number of weights in each layer: PEFT rounds down, we to the nearest


@pytest.mark.parametrize(("method", "theirs", "settings"), CASES)
@pytest.mark.parametrize("weights", [[0.5, 2.0], [1.0, 1.0]])
def test_combinations_agree_with_peft(method, theirs, settings, weights, capsys):
    peft = pytest.importorskip("peft")
    model = two_of_rank_4(stabilized=False)
    wrapped = with_peft(peft, model, stabilized=False)
    rank = {"svd_rank": settings["rank"]} if settings else {}
    wrapped.add_weighted_adapter(
        ["x", "y"], weights, "new", combination_type=theirs, density=THIRD, **rank
    )
    mp.combine_adapters(
        model, ["x", "y"], weights, method, new_name="new", density=THIRD, **settings
    )
    differences = [
        relative(combined(model, place), layer.get_delta_weight("new").detach().double())
        for place, layer in wrapped.base_model.model.items()
    ]
    if method == "ties" and weights[0] != weights[1]:
        # PEFT elects signs before it weights: an adapter of weight 0.01 votes like one of 1
        assert min(differences) > 0.01
        return
    with capsys.disabled():
        print(f"\n{method} of {weights} against PEFT: {max(differences):.1e}")
    assert max(differences) <= 1e-5  # float32


@pytest.mark.parametrize(("method", "theirs", "settings"), CASES[:2])
def test_pefts_rank_stabilised_combination_is_too_large_by_root_rank(
    method, theirs, settings, capsys
):
    peft = pytest.importorskip("peft")
    model = two_of_rank_4(stabilized=True)
    wrapped = with_peft(peft, model, stabilized=True)
    rank = {"svd_rank": 8} if settings else {}  # the whole of it
    wrapped.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", combination_type=theirs, **rank)
    rank = {"rank": 8} if settings else {}
    expected = sum(s[0].delta().detach().double() for s in
                   (named(model)["x"]["up"], named(model)["y"]["up"]))  # fmt: skip
    mp.combine_adapters(model, ["x", "y"], [1.0, 1.0], method, new_name="new", **rank)
    theirs_up = wrapped.base_model.model["up"].get_delta_weight("new").detach()
    ratio = (theirs_up.double().norm() / expected.norm()).item()
    error = relative(combined(model, "up"), expected)
    with capsys.disabled():
        print(f"\n{method}, rank-stabilised: ours is off by {error:.1e}, PEFT's {ratio:.3f} x")
    assert error <= 1e-6  # float32
    assert abs(ratio - 8**0.5) < 1e-4  # the root of the result's rank


def test_half_precision_factors_are_combined_in_float32():
    model = make(dtype=torch.bfloat16)
    expected = {p: weighted(dense_deltas(model, p)) for p in ("up", "down")}
    mp.combine_adapters(model, NAMES, WEIGHTS, new_name="new")
    for place, value in expected.items():
        assert named(model)["new"][place][0].lora_b.dtype == torch.float32
        assert relative(combined(model, place), value) <= 1e-6  # float32


def test_adapters_that_are_no_sources_stay_as_they_are():
    model = make()
    mp.use_adapters(model, ["default", "fr"])
    mp.combine_adapters(model, ["fr", "de"], [1.0, 1.0], new_name="new")
    on = {n: [a.enabled for s in p.values() for a in s] for n, p in named(model).items()}
    assert on == {"new": [True] * 2, "default": [True] * 2, "fr": [False] * 2, "de": [False] * 2}


def test_a_model_that_is_itself_a_layer_is_refused():
    layer = mp.LoRALinear(nn.Linear(8, 4), 2)
    with pytest.raises(ValueError, match="itself a layer"):
        mp.combine_adapters(layer, ["default"], [1.0], new_name="new")
