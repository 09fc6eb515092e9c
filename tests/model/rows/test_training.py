"""Several adapters trained in one pass: every gradient as in a run of the adapter's own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.adapters.names import named
from minipeft.adapters.protocol import innermost
from minipeft.adapters.state import named_tensors
from minipeft.layers import LoRABank
from minipeft.layers.dora import DoRALinear
from minipeft.model.rows import RowStack
from tests.row_kinds import KINDS, by_hand, linear, randomize, three

ROWS = ["fr", None, "default", ["fr", "de"], "de", "fr"]
SORTED = ["default", "default", "de", None, "fr", "fr"]
# float64: the same products over matrices of other heights, whose sums have another order
EXACT = 1e-12


def plain_lora(base):
    def make():
        model = three(nn.Sequential(base(24, 15), nn.Tanh(), base(15, 9)), ("0", "2"))
        return model, torch.randn(6, 3, 24)

    return make


def transposed(*sizes):
    made = pytest.importorskip("transformers.pytorch_utils").Conv1D(*sizes[::-1])
    nn.init.normal_(made.bias)
    return made


def nf4():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 9))
    mp.quantize_model(model, head=())
    return three(model, ("0", "2")), torch.randn(6, 3, 64)


TRAINED = {"linear": plain_lora(nn.Linear), "Conv1D": plain_lora(transposed), "NF4": nf4, **KINDS}


def double(kind):
    model, x = TRAINED[kind]()
    model.double().train()
    return model, x.double() if x.is_floating_point() else x


def gradients(model, names=("default", "fr", "de")):
    """By adapter and the name of the parameter in the plain model."""
    return {
        (name, key): p.grad for name in names if name in named(model)
        for key, p in named_tensors("test", model, name)[0].items()
    }  # fmt: skip


def without_rows(model):
    model = copy.deepcopy(model)
    mp.use_adapters(model, [*named(model)])
    return model


def of_one(model, row):
    """A copy of the model with the adapters of this row and no others."""
    wanted = () if row is None else (row,) if isinstance(row, str) else tuple(row)
    model = without_rows(model)
    for name in [*named(model)]:
        if name not in wanted:
            mp.remove(model, name=name)
    return model


def key_of(row):
    return tuple(row) if isinstance(row, list) else row


def own_means(y, rows):
    """The sum over adapters of the mean over their own rows, of what each row's output costs."""
    each, keys = len(y) // len(rows), [key_of(row) for row in rows]
    costs = y.float().square() if y.dtype == torch.bfloat16 else y.square()
    of_row = costs.flatten(1).mean(1).view(len(rows), each).mean(1)
    return sum(of_row[[i for i, k in enumerate(keys) if k == key]].mean() for key in {*keys})


def runs_of_their_own(model, x, rows):
    """The gradients of separate runs, added up, and of the input; x in the order of the batch."""
    added, each, dx = {}, len(x) // len(rows), None
    if x.is_floating_point():
        dx = torch.zeros_like(x)
    for key in {key_of(row) for row in rows}:
        own = of_one(model, key)
        own.zero_grad()
        index = [i * each + j for i, row in enumerate(rows) if key_of(row) == key
                 for j in range(each)]  # fmt: skip
        part = x[index].detach()
        if dx is not None:
            part.requires_grad_()
        y = own(part)
        if y.requires_grad:
            own_means(y, [key] * len(index)).backward()
        for name, gradient in gradients(own).items():
            if gradient is not None:
                added[name] = added.get(name, 0) + gradient
        if dx is not None:
            dx[index] = part.grad
    return added, dx


def worst(found, expected):
    """The largest difference, relative to the largest number of each gradient."""
    assert {k for k, g in found.items() if g is not None} == expected.keys()
    return max(
        float((found[k] - g).abs().max() / g.abs().max().clamp(min=1e-30))
        for k, g in expected.items()
    )


@pytest.mark.parametrize("rows", [ROWS, SORTED], ids=["mixed", "sorted"])
@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_equal_those_of_runs_of_their_own(kind, rows, capsys):
    model, x = double(kind)
    expected, dx = runs_of_their_own(model, x, rows)
    assert mp.use_adapters(model, rows=rows)
    x = x.requires_grad_() if x.is_floating_point() else x
    model.zero_grad()
    own_means(model(x), rows).backward()
    difference = worst(gradients(model), expected)
    with capsys.disabled():
        print(f"\n{kind}: one pass against runs of their own {difference:.1e}")
    assert difference <= EXACT
    if dx is not None:
        assert float((x.grad - dx).abs().max() / dx.abs().max()) <= EXACT
    assert all(p.grad is None for p in innermost_parameters(model))


def innermost_parameters(model):
    mine = {id(p) for p in mp.adapter_parameters(model)}
    return [p for p in model.parameters() if id(p) not in mine]


@pytest.mark.parametrize("kind", ["linear", "NF4", "linear, DoRA", "embedding", "convolution, 2"])
def test_several_rows_of_the_batch_for_each_entry(kind):
    model, x = double(kind)
    x = torch.cat([x, x.flip(1)])[torch.randperm(12)]
    expected, _ = runs_of_their_own(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    own_means(model(x), ROWS).backward()
    assert worst(gradients(model), expected) <= EXACT
    model.zero_grad()
    mp.use_adapters(model, rows=["fr"])  # one entry, for batches of any size
    own_means(model(x[:5]), ["fr"] * 5).backward()
    expected, _ = runs_of_their_own(model, x[:5], ["fr"] * 5)
    assert worst(gradients(model), expected) <= EXACT


@pytest.mark.parametrize("kind", ["linear", "NF4", "linear, DoRA"])
def test_two_batches_add_up(kind):
    model, x = double(kind)
    added = {}
    for rows, part in ((ROWS, x), (SORTED, x.flip(0))):
        for name, gradient in runs_of_their_own(model, part, rows)[0].items():
            added[name] = added.get(name, 0) + gradient
    for rows, part in ((ROWS, x), (SORTED, x.flip(0))):
        mp.use_adapters(model, rows=rows)
        own_means(model(part), rows).backward()
    assert worst(gradients(model), added) <= EXACT


def groups_of(model, rates):
    return [
        {"params": [*mp.adapter_parameters(model, name=name)], "lr": rate}
        for name, rate in rates.items()
    ]


@pytest.mark.parametrize("kind", ["linear", "NF4", "linear, DoRA", "embedding"])
def test_a_sweep_in_one_optimiser_is_the_single_runs(kind):
    """Clipped by group; what is learnt is served after `eval()` without another call."""
    rates = {"default": 1e-1, "fr": 1e-2, "de": 1e-3}
    model, x = double(kind)
    singles = {name: of_one(model, name) for name in rates}
    finished = {}
    for name, own in singles.items():
        optimizer = torch.optim.AdamW(groups_of(own, {name: rates[name]}))
        for _ in range(4):
            optimizer.zero_grad()
            own(x[:2]).square().mean().backward()
            nn.utils.clip_grad_norm_(mp.adapter_parameters(own), 1e-3)
            optimizer.step()
        finished[name] = mp.adapter_state_dict(own, name=name)
    rows = [name for name in rates for _ in range(2)]
    batch = torch.cat([x[:2]] * 3)
    optimizer = torch.optim.AdamW(groups_of(model, rates))
    mp.use_adapters(model, rows=rows)
    for _ in range(4):
        optimizer.zero_grad()
        own_means(model(batch), rows).backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1e-3)
        optimizer.step()
    for name, state in finished.items():
        for key, value in mp.adapter_state_dict(model, name=name).items():
            # AdamW divides by the root of squares: rounding of gradients near zero is magnified
            torch.testing.assert_close(value, state[key], rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        y = model.eval()(batch)
        for i, name in enumerate(rates):
            alone = singles[name].eval()(x[:2])
            torch.testing.assert_close(y[2 * i :][:2], alone, rtol=1e-6, atol=1e-7)  # the same


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_layers_mode_and_dropout_are_those_of_now(dora):
    """Set on the layer itself, after `use_adapters`."""
    model, x = linear(dora=dora, dropout=0.5)
    model.double().train()
    x = x.double()
    mp.use_adapters(model, rows=ROWS)
    drops = lambda: not torch.equal(model(x), model(x))  # noqa: E731
    layers = [layer for layer in model.modules() if isinstance(layer, mp.LoRALinear)]
    assert drops()
    for layer in layers:
        layer.training = False
    assert not drops()
    for layer in layers:
        layer.training = True
    assert drops()
    for layer in layers:
        layer.dropout = 0.0
    expected, _ = runs_of_their_own(model, x, ROWS)
    assert not drops()
    own_means(model(x), ROWS).backward()
    assert worst(gradients(model), expected) <= EXACT


def test_an_adapter_without_a_row_has_no_gradient_and_does_not_move():
    model, x = double("linear")
    rows = ["fr", "fr", None, "fr", "fr", "fr"]
    mp.use_adapters(model, rows=rows)
    before = {k: v.clone() for k, v in mp.adapter_state_dict(model, name="default").items()}
    optimizer = torch.optim.AdamW(groups_of(model, {"default": 0.1, "fr": 0.1}), weight_decay=0.5)
    own_means(model(x), rows).backward()
    optimizer.step()
    assert all(g is None for (name, _), g in gradients(model).items() if name != "fr")
    assert all(g is not None for (name, _), g in gradients(model).items() if name == "fr")
    for key, value in mp.adapter_state_dict(model, name="default").items():
        assert torch.equal(value, before[key])
    assert mp.check_gradients(model) == 4  # it asks for those that rows use


def test_check_gradients_names_what_rows_use_and_the_loss_does_not():
    model, x = double("linear")
    mp.use_adapters(model, "de")
    mp.use_adapters(model, rows=ROWS)
    model[0](x).sum().backward()
    with pytest.raises(ValueError, match="6 of 12 adapter parameters got no gradient"):
        mp.check_gradients(model)


def test_a_frozen_adapter_computes_and_does_not_train():
    model, x = double("linear")
    for parameter in mp.adapter_parameters(model, name="de"):
        parameter.requires_grad_(False)
    expected, _ = runs_of_their_own(model, x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    own_means(model(x), ROWS).backward()
    assert worst(gradients(model, ("fr", "default")), {
        k: g for k, g in expected.items() if k[0] != "de"
    }) <= EXACT  # fmt: skip
    assert all(p.grad is None for p in mp.adapter_parameters(model, name="de"))
    for parameter in mp.adapter_parameters(model):
        parameter.requires_grad_(False)
    assert not model(x).requires_grad


@pytest.mark.parametrize("kind", ["linear", "NF4", "linear, DoRA", "embedding", "convolution, 1"])
def test_an_adapter_that_diverged_stays_in_its_rows(kind):
    """In the gradients of others too, in evaluation, and when rows are chosen again."""
    model, x = double(kind)
    others = ["fr", None, "default", "fr", "default", "fr"]
    rows = ["fr", None, "default", "fr", "de", "fr"]
    healthy, _ = runs_of_their_own(model, x, rows)
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model, name="de"):
            parameter.fill_(torch.nan)
    mp.use_adapters(model, rows=rows)
    own_means(model(x), rows).backward()
    found = gradients(model, ("fr", "default"))
    assert worst(found, {k: g for k, g in healthy.items() if k[0] != "de"}) <= EXACT
    with torch.no_grad():
        y = model.eval()(x)
    assert y[:4].isfinite().all()
    assert not y[4].isfinite().all()
    mp.use_adapters(model.train(), rows=rows)
    assert model(x)[:4].isfinite().all()
    mp.use_adapters(model, rows=others)
    assert model(x).isfinite().all()


def test_rows_without_an_adapter_are_the_base_bit_for_bit():
    model, x = TRAINED["linear"]()
    with mp.disable_adapters(model):
        base = model(x)
    mp.use_adapters(model.train(), rows=ROWS)
    assert torch.equal(model(x)[1], base[1])
    with mp.disable_adapters(model):
        assert torch.equal(model(x), base)
    own_means(model(x), ROWS).backward()
    assert mp.check_gradients(model) == 12


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["linear", "linear, DoRA"])
def test_what_was_trained_is_served(kind, mode):
    """In whichever mode it was trained, and whichever mode came before `use_adapters`."""
    model, x = double(kind)
    mp.use_adapters(model.eval(), rows=ROWS)
    with torch.no_grad():
        first = model(x)
    getattr(model, mode)()
    optimizer = torch.optim.SGD(mp.adapter_parameters(model), lr=0.3)
    own_means(model(x), ROWS).backward()
    optimizer.step()
    with torch.no_grad():
        served = model.eval()(x) if mode == "train" else model(x)
        assert not torch.allclose(served, first)
        for i, row in enumerate(ROWS):
            # float64; magnitudes times norms of other sums
            torch.testing.assert_close(
                served[i : i + 1], of_one(model, row)(x[i : i + 1]),
                rtol=1e-9, atol=1e-9,
            )  # fmt: skip


@pytest.mark.parametrize("how", ["fused", "data"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "linear, DoRA"])
def test_changes_that_leave_no_trace_are_served(kind, how):
    """In eval mode, also after a call between backward and the step."""
    model, x = double(kind)
    mp.use_adapters(model.eval(), rows=ROWS)
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=0.3, fused=how == "fused")
    for _ in range(2):
        own_means(model(x), ROWS).backward()
        with torch.no_grad():
            before = model(x)
        if how == "fused":
            optimizer.step()
        else:
            for parameter in mp.adapter_parameters(model):
                parameter.data += 0.3
        with torch.no_grad():
            served = model(x)
        assert not torch.allclose(served, before)
        assert torch.equal(served, model(x))
        with torch.no_grad():  # float64: one product in the place of several
            torch.testing.assert_close(model.eval()(x), served, rtol=1e-9, atol=1e-9)


def test_after_a_call_with_gradients_the_layers_compute_until_the_mode_is_set(monkeypatch):
    model, x = TRAINED["linear"]()
    mp.use_adapters(model.eval(), rows=ROWS)
    asked = []
    original = LoRABank.ask_layers
    monkeypatch.setattr(LoRABank, "ask_layers", lambda *a: asked.append(1) or original(*a))
    for renew in (model.eval, lambda: mp.use_adapters(model, rows=ROWS)):
        assert model(x).requires_grad  # an evaluation that forgot no_grad
        asked.clear()
        with torch.no_grad():
            model(x)
            assert len(asked) == 2
            renew()
            model(x)
        assert len(asked) == 2
    assert isinstance(model[0], LoRABank)
    assert model[0].a.shape == (3, 8, 24)
    assert model.train()[0].a.numel() == 0  # copies are freed while they would be stale
    assert model.eval()[0].a.shape == (3, 8, 24)


def test_every_row_has_a_dropout_mask_of_its_own():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    for name, dropout in (("default", 0.5), ("fr", 0.9), ("de", 0.0)):
        mp.inject_lora(model, ["0"], 64, dropout=dropout, name=name)
    with torch.no_grad():
        innermost(model[0]).weight.zero_()
        for parameter in mp.adapter_parameters(model):
            parameter.copy_(torch.eye(64))
    rows = ["default", "fr", "de", "default"]
    mp.use_adapters(model.train(), rows=rows)
    y = model(torch.ones(4, 64))
    assert torch.equal(y[2], torch.ones(64))
    for row, kept, value in ((0, 0.5, 2.0), (1, 0.1, 10.0), (3, 0.5, 2.0)):
        # 64 draws: five standard deviations of their number are at most 20
        assert abs(int((y[row] != 0).sum()) - 64 * kept) <= 20
        torch.testing.assert_close(y[row][y[row] != 0], torch.tensor(value).expand_as(
            y[row][y[row] != 0]))  # fmt: skip
    assert not torch.equal(y[0] != 0, y[3] != 0)
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(4, 64)), torch.ones(4, 64))


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_dora_with_dropout_takes_the_masks_of_a_run_of_its_own(kind):
    """The base's product of the dropped input too (DoRALinear.scaled)."""
    if kind == "linear":
        model, x = linear(dora=True, dropout=0.4)
    else:
        place = nn.Embedding(40, 16) if kind == "embedding" else nn.Conv1d(6, 4, 3)
        model = three(nn.Sequential(place), dora=True, dropout=0.4)
        x = torch.arange(12).view(4, 3) if kind == "embedding" else torch.randn(4, 6, 9)
    model.double().train()
    x = x.double() if x.is_floating_point() else x
    single = of_one(model, "fr")
    torch.manual_seed(5)
    expected = single(x)
    mp.use_adapters(model, rows=["fr"])
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)  # norms are float32


def test_the_base_runs_once_and_a_4_bit_weight_is_decoded_once_each_way(monkeypatch):
    model, x = nf4()
    calls = []
    innermost(model[0]).register_forward_hook(lambda *_: calls.append(1))
    mp.use_adapters(model.train(), rows=ROWS)
    from minipeft import qlora

    decoded = []
    original = qlora.multiply
    monkeypatch.setattr(qlora, "multiply", lambda *a: decoded.append(1) or original(*a))
    own_means(model(x), ROWS).backward()
    assert calls == [1]
    assert len(decoded) == 2  # a product for each of the two layers, whatever the rows use


def test_other_numbers_of_rows_and_bad_names_raise_in_training_too():
    model, x = double("linear")
    mp.use_adapters(model, rows=ROWS)
    for wrong in (x[:4], x[0, 0]):
        with pytest.raises(ValueError, match="for 6 rows"):
            model(wrong)
    before = model(x)
    for rows, match in ((["es"] * 6, "'es'"), ([], "empty"), ("fr", "expected a list")):
        with pytest.raises(ValueError, match=match):
            mp.use_adapters(model, rows=rows)
        assert torch.equal(model(x), before)
    mp.use_adapters(model, "fr")
    mp.merge(model)
    with pytest.raises(ValueError, match="is merged"):
        mp.use_adapters(model, rows=ROWS)
    mp.unmerge(model)
    for call in (mp.merge, mp.remove):
        mp.use_adapters(model, rows=ROWS)
        with pytest.raises(ValueError, match="rows of a batch"):
            call(model)
    assert torch.equal(model(x), before)


def test_a_failed_call_while_rows_train_changes_nothing(monkeypatch):
    model, x = double("LoRA and DoRA")
    mp.use_adapters(model, rows=ROWS)
    before, modules = model(x), [*model.modules()]

    def fails(*_):
        raise ValueError("on purpose")

    monkeypatch.setattr(RowStack, "follow", fails)
    with pytest.raises(ValueError, match="on purpose"):
        mp.use_adapters(model, rows=SORTED)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), before)


def test_statistics_over_the_batch_are_refused_in_training():
    def make(**settings):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, **settings), nn.Linear(8, 8))
        mp.inject_lora(model, ["0", "2"], 2)
        mp.inject_lora(model, ["0", "2"], 3, name="fr")
        return randomize(model)

    x, rows = torch.randn(2, 8), ["default", "fr"]
    model = make(track_running_stats=False)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) takes statistics over all rows"):
        mp.use_adapters(model.train(), rows=rows)
    assert isinstance(model[0], mp.LoRALinear)
    mp.use_adapters(model.eval(), rows=rows)  # served as ever
    model(x)
    with pytest.raises(ValueError, match="takes statistics over all rows"):
        model.train()(x)
    frozen = make()  # running statistics of a frozen base stand still
    mp.use_adapters(frozen.train(), rows=rows)
    y = frozen(x)
    assert torch.equal(frozen(torch.stack([x[0], x[0]]))[0], y[0])
    mp.use_adapters(frozen, ["default", "fr"])
    frozen[1].requires_grad_(True)  # it trains by itself, and would follow the batch
    with pytest.raises(ValueError, match="freeze it, if it keeps running statistics"):
        mp.use_adapters(frozen.train(), rows=rows)
    for kind in (nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.InstanceNorm1d(8), nn.Identity()):
        model = nn.Sequential(nn.Linear(8, 8), kind)
        mp.inject_lora(model, ["0"], 2)
        mp.use_adapters(model.train(), rows=["default", None])


def test_a_norm_that_trains_as_a_whole_sees_its_own_rows():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    for name in ("default", "fr"):
        mp.inject_lora(model, ["0"], 2, name=name)
    mp.train_modules(model, ["1"])
    randomize(model).double().train()
    x, rows = torch.randn(6, 8).double(), ["default", "fr", "default", "fr", "fr", "default"]
    expected, _ = runs_of_their_own(model, x, rows)
    mp.use_adapters(model, rows=rows)
    own_means(model(x), rows).backward()
    # float64; what a norm passes back is the difference of nearly equal sums
    assert worst(gradients(model), expected) <= 1e-9


@pytest.mark.parametrize("kind", ["modules", "biases", "tokens", "embedding", "linear, DoRA"])
def test_bf16_bases_train(kind):
    model, x = TRAINED[kind]()
    base = {id(p) for p in innermost_parameters(model)}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in base and p.is_floating_point():
                module._parameters[name] = nn.Parameter(p.bfloat16(), requires_grad=False)
    x = x.bfloat16() if x.is_floating_point() else x
    expected, _ = runs_of_their_own(model.train(), x, ROWS)
    mp.use_adapters(model, rows=ROWS)
    y = model(x)
    assert y.dtype == torch.bfloat16
    own_means(y, ROWS).backward()
    # some roundings to 8 bits of products and sums, over matrices of other heights
    assert worst(gradients(model), expected) <= 2.0**-4


@pytest.mark.parametrize("kind", ["linear", "NF4", "linear, DoRA", "embedding", "convolution, 2"])
def test_autocast(kind):
    model, x = TRAINED[kind]()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = runs_of_their_own(model, x, ROWS)
        mp.use_adapters(model, rows=ROWS)
        y = model(x)
        loss = own_means(y.float(), ROWS)
    loss.backward()
    # roundings to 8 bits of products and sums, over matrices of other heights
    assert worst(gradients(model), expected) <= 2.0**-4


def test_a_copy_trains_adapters_of_its_own():
    model, x = double("LoRA and DoRA")
    mp.use_adapters(model, rows=ROWS)
    twin = copy.deepcopy(model)
    own_means(twin(x), ROWS).backward()
    assert all(p.grad is None for p in mp.adapter_parameters(model))
    found = gradients(twin)
    own_means(model(x), ROWS).backward()
    assert worst(found, gradients(model)) == 0


class Stretched(mp.LoRALinear):
    """A layer of one's own with numbers by row that train, and no `on_top_now`."""

    def __init__(self, base, rank):
        super().__init__(base, rank)
        self.stretch = nn.Parameter(torch.ones(base.out_features))

    def forward(self, x):
        return self.on_top(self.base(x), x, self.full_strength, *self.lengths())

    def on_top(self, out, x, strength, stretch):
        return super().on_top(out, x, strength) * stretch

    def lengths(self):
        return (self.stretch * self.stretch,)


def test_a_layer_of_ones_own_with_lengths_trains_them():
    model = by_hand(nn.Sequential(nn.Linear(8, 9)), Stretched).double().train()
    x = torch.randn(6, 3, 8).double()
    expected, _ = runs_of_their_own(model, x, ROWS)
    assert ("fr", "0.stretch") in expected
    mp.use_adapters(model, rows=ROWS)
    own_means(model(x), ROWS).backward()
    assert worst(gradients(model), expected) <= EXACT


def test_dora_over_codes_of_4_bits_makes_no_dense_weight(monkeypatch):
    """In a stack other adapters lie below, which rows do not use."""
    model, x = TRAINED["linear, DoRA, NF4"]()
    mp.use_adapters(model.train(), rows=["fr", "default", "de", "de", "fr", None])
    monkeypatch.setattr(DoRALinear, "exact_below", lambda *_: pytest.fail("a dense weight"))
    model[0](x).sum().backward()


def test_layers_that_write_in_place_follow():
    """Results are new tensors, also where all rows use the same adapter or none."""
    model, x = double("linear")
    model[1] = nn.ReLU(inplace=True)
    for rows in (ROWS, ["fr"] * 6, [None] * 5 + ["de"]):
        expected, _ = runs_of_their_own(model, x, rows)
        model.zero_grad()
        mp.use_adapters(model, rows=rows)
        own_means(model(x), rows).backward()
        assert worst(gradients(model), expected) <= EXACT
        mp.use_adapters(model, "fr")


@pytest.mark.parametrize("kind", ["linear", "NF4", "linear, DoRA", "embedding"])
def test_torch_func_sees_the_same_gradients(kind):
    model, x = double(kind)
    mp.use_adapters(model, rows=ROWS)
    own_means(model(x), ROWS).backward()
    named_ = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return own_means(torch.func.functional_call(model, parameters, (x,)), ROWS)

    found = torch.func.grad(loss)({n: p.detach() for n, p in named_.items()})
    for name, parameter in named_.items():
        # float64; DoRA's layers lie in no module's tree, and read their parameters there
        torch.testing.assert_close(found[name], parameter.grad, rtol=EXACT, atol=1e-14)


def test_a_pickled_model_trains_on():
    model, x = double("LoRA and DoRA")
    mp.use_adapters(model, rows=ROWS)
    own_means(model(x), ROWS).backward()
    again = pickle.loads(pickle.dumps(model))
    again.zero_grad()
    own_means(again(x), ROWS).backward()
    assert worst(gradients(again), gradients(model)) == 0
