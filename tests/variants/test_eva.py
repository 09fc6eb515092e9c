"""EVA: the incremental decomposition, ranks, and that nothing else changes."""

import numpy as np
import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.variants.eva import IncrementalSVD


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
    ranks = mp.init_eva(model, data, rho=1.0)
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
    ranks = mp.init_eva(model, data, rho=2.0)
    assert sum(ranks.values()) == 12 and max(ranks.values()) <= 8 and min(ranks.values()) >= 1
    for layer, scaling in zip((model.q, model.k, model.out), scalings, strict=True):
        assert layer.scaling == scaling
        assert layer.rank == len(layer.lora_a) == layer.lora_b.shape[1]
        rebuilt = mp.lora_scaling(layer.alpha, layer.rank, rank_stabilized=True)
        assert rebuilt == pytest.approx(scaling)
    model(data[0]).sum().backward()
    assert mp.check_gradients(model) == 6
    assert model.training and not model.q._forward_pre_hooks


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_batches_of_other_forms(kind):
    model = Block()
    mp.inject_lora(model, ["q"], 2)
    data = [{"x": x} if kind == "dict" else (x,) for x in batches()]
    assert mp.init_eva(model, data) == {"q": 2}


def test_a_failure_leaves_the_model_as_it_was():
    model = Block()
    mp.inject_lora(model, ["q", "out"], 4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for data, arguments, message in (
        ([], {}, "no batch reached"), ([torch.randn(2, 16)], {}, "too few"),
        ([torch.full((40, 16), float("nan"))], {}, "NaN"), (batches(), {"rho": 0.5}, "rho"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mp.init_eva(model, data, **arguments)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert model.training and not model.q._forward_pre_hooks
    with pytest.raises(ValueError, match="no LoRALinear"):
        mp.init_eva(Block(), batches())


@pytest.mark.parametrize("start", ["trained", "PiSSA"])
def test_what_does_not_start_at_zero_is_refused(start):
    model = Block()
    mp.inject_lora(model, ["q"], 4, init=mp.init_pissa if start == "PiSSA" else None)
    if start == "trained":
        nn.init.normal_(model.q.lora_b)
    with pytest.raises(ValueError, match="do not start at zero"):
        mp.init_eva(model, batches())
