"""The benchmark of training by row compares what it times."""

import pytest

from benchmarks.rows_training import ALLOWED, Case, in_turn


@pytest.mark.parametrize("tokens", [1, 5])
def test_both_ways_have_the_same_gradients(tokens):
    case = Case((65, 64), adapters=3, tokens=tokens)
    assert case.difference() <= ALLOWED
    times = in_turn(case, rounds=2)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(times, 2)
    assert case.x.grad is None or case.x.grad.isfinite().all()
