"""EVA: the incremental decomposition, ranks, and that nothing else changes."""

import numpy as np
import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.starts.eva import IncrementalSVD


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(torch.relu(self.q(x) * self.k(x)))


def batches(count=6):
    directions = torch.randn(3, 16)
    return [torch.randn(40, 3) @ directions + 0.01 * torch.randn(40, 16) for _ in range(count)]


def test_in_batches_it_finds_what_one_decomposition_of_all_rows_finds():
    rows = torch.cat(batches())
    svd, few = IncrementalSVD(8), IncrementalSVD(3)
    for part in rows.split(40):
        svd.update(part, tau=0.99)
        few.update(part, tau=0.9)
    _, s, v = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    for found, value, exact in zip(svd.vectors[:3], svd.values[:3], v[:3], strict=False):
        assert abs(float(found.double() @ torch.from_numpy(exact))) > 0.9999
        assert value > 0
    np.testing.assert_allclose(svd.values[:3].numpy(), s[:3], rtol=1e-3)  # 0.01 noise is cut
    assert few.converged  # the three directions that the rows have; noise never settles
    assert not svd.converged


def test_a_has_the_directions_of_the_inputs_and_the_output_stays():
    model, data = Block(), batches()
    mp.inject_lora(model, ["q", "k", "out"], 4, 8)
    before = model(data[0])
    ranks = mp.starts.eva(model, data, rho=1.0)
    assert ranks == {"q": 4, "k": 4, "out": 4}
    assert torch.equal(model(data[0]), before)  # B = 0
    _, _, v = torch.linalg.svd(torch.cat(data), full_matrices=False)
    cosine = (model.q.lora_a[:3] * v[:3]).sum(1).abs()
    assert (cosine > 0.99).all()  # tau: it stops once they move less
    assert torch.equal(model.q.lora_a, model.k.lora_a)  # the same inputs


def test_the_rank_budget_stays_and_scalings_too():
    model, data = Block(), batches()
    mp.inject_lora(model, ["q", "k", "out"], 4, 8, rank_stabilized=True)
    scalings = [layer.scaling for layer in (model.q, model.k, model.out)]
    ranks = mp.starts.eva(model, data, rho=2.0)
    assert sum(ranks.values()) == 12 and max(ranks.values()) <= 8 and min(ranks.values()) >= 1
    for layer, scaling in zip((model.q, model.k, model.out), scalings, strict=True):
        assert layer.scaling == scaling
        assert layer.rank == len(layer.lora_a) == layer.lora_b.shape[1]
        rebuilt = mp.lora_scaling(layer.alpha, layer.rank, rank_stabilized=True)
        # a quotient and a product in Python's floats; approx allows 1e-6
        assert rebuilt == pytest.approx(scaling)
    model(data[0]).sum().backward()
    assert mp.check_gradients(model) == 6
    assert model.training and not model.q._forward_pre_hooks


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_batches_of_other_forms(kind):
    model = Block()
    mp.inject_lora(model, ["q"], 2)
    data = [{"x": x} if kind == "dict" else (x,) for x in batches()]
    assert mp.starts.eva(model, data) == {"q": 2}


def test_a_failure_leaves_the_model_as_it_was():
    model = Block()
    mp.inject_lora(model, ["q", "out"], 4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for data, arguments, message in (
        ([], {}, "no batch reached"), ([torch.randn(2, 16)], {}, "too few"),
        ([torch.full((40, 16), float("nan"))], {}, "NaN"), (batches(), {"rho": 0.5}, "rho"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mp.starts.eva(model, data, **arguments)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert model.training and not model.q._forward_pre_hooks
    with pytest.raises(ValueError, match="no LoRALinear"):
        mp.starts.eva(Block(), batches())


@pytest.mark.parametrize("start", ["trained", "PiSSA"])
def test_what_does_not_start_at_zero_is_refused(start):
    model = Block()
    mp.inject_lora(model, ["q"], 4, init=mp.starts.pissa() if start == "PiSSA" else None)
    if start == "trained":
        nn.init.normal_(model.q.lora_b)
    with pytest.raises(ValueError, match="do not start at zero"):
        mp.starts.eva(model, batches())


def test_inputs_are_taken_in_before_the_model_changes_them_and_also_by_keyword():
    class Overwriting(Block):
        def forward(self, x):
            x = x * 1.0
            y = self.q(x=x)
            x.zero_()
            return y

    model, x = Overwriting(), batches(1)[0]
    mp.inject_lora(model, ["q"], 3)
    mp.starts.eva(model, [x])
    _, _, v = torch.linalg.svd(x, full_matrices=False)
    assert ((model.q.lora_a * v[:3]).sum(1).abs() > 0.9999).all()  # the same float32 rows


def test_the_same_tensor_is_decomposed_once(monkeypatch):
    model, calls, update = Block(), [], IncrementalSVD.update
    monkeypatch.setattr(IncrementalSVD, "update", lambda s, *a: calls.append(1) or update(s, *a))
    mp.inject_lora(model, ["q", "k", "out"], 3)
    mp.starts.eva(model, batches(2), tau=1.0)
    assert len(calls) == 4  # q with k, and out; two batches


def test_a_share_is_of_all_the_variance_and_ranks_follow_it():
    rows = torch.randn(100, 16)
    svd = IncrementalSVD(4)
    for part in rows.split(40):
        svd.update(part, tau=1.0)
    # 100 x 16 squares in float32 against float64
    assert svd.total == pytest.approx(float(rows.double().square().sum()), rel=1e-6)

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, narrow, wide):
            return self.narrow(narrow) + self.wide(wide)

    model = Apart()
    mp.inject_lora(model, ["narrow", "wide"], 3)
    narrow, wide = torch.randn(40, 6) @ torch.randn(6, 16), torch.randn(40, 16)
    squares = [np.linalg.svd(t.double().numpy(), compute_uv=False) ** 2 for t in (narrow, wide)]
    shares = [(s / squares[i].sum(), i) for i in (0, 1) for s in squares[i][1:6]]  # one each is set
    best = sorted(shares, reverse=True)[:4]
    expected = {name: 1 + sum(i == which for _, i in best)
                for i, name in enumerate(("narrow", "wide"))
                for which in [i]}  # fmt: skip
    assert mp.starts.eva(model, [(narrow, wide)]) == expected
    assert expected["narrow"] > expected["wide"]


def test_batches_that_do_not_fit_say_forward():
    model, data = Block(), batches()
    mp.inject_lora(model, ["q", "k", "out"], 4)
    before = {name: id(p) for name, p in model.named_parameters()}
    pairs = [(x, torch.zeros(len(x))) for x in data]
    for given in (pairs, [{"input": x} for x in data]):
        with pytest.raises(ValueError, match=r"does not fit Block.forward .*forward=lambda model"):
            mp.starts.eva(model, given)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert mp.starts.eva(model, pairs, forward=lambda model, batch: model(batch[0]))
