"""What autograd finds, in float64."""

import torch

import minipeft as mp


def test_gradients_equal_autograd(mine):
    torch.manual_seed(0)
    x, g = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    a = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    mp.lora_forward(x, a, b, 0.5).backward(g)
    with torch.no_grad():
        found_a, found_b = mine.gradients(x, a, b, 0.5, g)
    torch.testing.assert_close(found_a, a.grad)
    torch.testing.assert_close(found_b, b.grad)


def test_in_the_first_step_only_b_has_a_gradient(mine):
    torch.manual_seed(0)
    x, a, g = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5, 6)
    found_a, found_b = mine.gradients(x, a, torch.zeros(6, 3), 0.5, g)
    assert found_a.abs().max() == 0 < found_b.abs().max()
