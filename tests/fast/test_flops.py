"""torch's counter of FLOPs counts 4-bit products as the dense ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minipeft as mp
from minipeft.fast.flops import attention_on_a_cpu


def counted(model, *inputs):
    with FlopCounterMode(display=False) as counter:
        model(*inputs).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3)])
def test_a_4_bit_layer_counts_as_the_dense_one_forward_and_backward(rows):
    layer = mp.NF4Linear.from_linear(nn.Linear(128, 33))
    x = torch.randn(*rows, 128, requires_grad=True)
    expected = 2 * x.numel() * 33  # y = x W^T, and the same for dx = dy W
    assert counted(layer, x) == 2 * expected == counted(layer.dense(), x)


def test_experts_and_adapters_count():
    experts = mp.layers.NF4Experts.from_weight(torch.randn(3, 8, 64))
    x, expert = torch.randn(5, 64, requires_grad=True), torch.tensor([0, 1, 0, 2, 2])
    assert counted(experts, x, expert) == 2 * (2 * 5 * 64 * 8)
    dense = nn.Linear(64, 32)
    packed = mp.LoRALinear(mp.NF4Linear.from_linear(dense), 2)
    assert counted(packed, x) == counted(mp.LoRALinear(dense, 2), x)


@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_cpu_counts_as_on_a_gpu(key_heads, causal):
    """By hand: two products forward, five backward; a causal mask halves nothing, as on a GPU."""
    batch, heads, queries, keys, width = 2, 6, 5, 7, 8
    q = torch.randn(batch, heads, queries, width, requires_grad=True)
    k, v = (torch.randn(batch, key_heads, keys, width, requires_grad=True) for _ in range(2))
    with FlopCounterMode(display=False, custom_mapping=attention_on_a_cpu()) as counter:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=key_heads < heads
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * batch * heads * queries * keys * width
    assert counter.get_total_flops() - forward == 2.5 * forward


def test_torchs_own_formulas_of_attention_say_the_same():
    """Those for GPUs; values of another width than keys too."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    from minipeft.fast.flops import attention_backward_flops, attention_flops

    q, k, v, out = (3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6), (3, 4, 5, 6)
    assert attention_flops(q, k, v) == sdpa_flop_count(q, k, v)
    assert attention_backward_flops(out, q, k, v) == sdpa_backward_flop_count(out, q, k, v)


COUNT = """
import sys
{first}
assert ("torch.utils.flop_counter" in sys.modules) == {there}
layer = minipeft.NF4Linear.from_linear(torch.nn.Linear(64, 8))
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(torch.ones(3, 64))
print(counter.get_total_flops())
"""


@pytest.mark.slow
def test_formulas_are_there_whichever_is_imported_first(plain_python):
    before = COUNT.format(first="import torch, torch.utils.flop_counter, minipeft", there=True)
    after = COUNT.format(first="import torch, minipeft", there=False)  # triton comes with it
    assert [int(plain_python(script)) for script in (before, after)] == [2 * 3 * 64 * 8] * 2
