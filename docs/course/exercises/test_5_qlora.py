"""Against the dense product, and what autograd keeps."""

import torch
from torch.autograd.graph import saved_tensors_hooks

import minipeft as mp


def test_values_and_gradients_are_those_of_the_dense_product(mine):
    torch.manual_seed(0)
    x = torch.randn(3, 128, requires_grad=True)
    packed, absmax = mp.quantize_nf4(torch.randn(96, 128))
    g = torch.randn(3, 96)
    y = mine.product(x, packed, absmax, 96)
    y.backward(g)
    w = mp.dequantize_nf4(packed, absmax, (96, 128))
    # the same float32 product of the same numbers; 1e-5 allows for another order of its sums
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, g @ w, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_dense_weight_is_kept(mine):
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    packed, absmax = mp.quantize_nf4(torch.randn(96, 128))
    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = mine.product(torch.randn(1, 128, requires_grad=True), packed, absmax, 96)
    y.sum().backward()
    assert sum(kept) < 96 * 128  # bytes; dense, W has four times as many
