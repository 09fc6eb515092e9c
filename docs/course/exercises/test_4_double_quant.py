"""The bytes that a layer holds."""

import pytest
from torch import nn

import minipeft as mp


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (63, 65), (64, 64), (200, 500)])
def test_bits_equal_those_of_a_layer(mine, shape, double_quant):
    layer = mp.NF4Linear.from_linear(nn.Linear(*shape, bias=False), double_quant=double_quant)
    stored = sum(parameter.numel() for parameter in layer.parameters())  # all are bytes
    n = shape[0] * shape[1]
    assert mine.bits(n, double_quant=double_quant) == 8 * stored / n


def test_a_large_tensor_costs_what_the_paper_says(mine):
    assert mine.bits(2**28, double_quant=True) == pytest.approx(4 + 0.127, abs=1e-3)
