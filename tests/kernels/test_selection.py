"""The table of plans, and files of measured ones."""

import json

import pytest

from minipeft_kernels.triton import selection
from minipeft_kernels.triton.selection import Plan, checked, plan_for, rows_of, save_plans

OPERATORS = ("nf4_linear", "nf4_linear_input_gradient")


@pytest.fixture
def plans_file(monkeypatch, tmp_path):
    path = tmp_path / "plans.json"
    monkeypatch.setenv("MINIPEFT_TRITON_PLANS", str(path))
    selection.measured_plans.cache_clear()
    yield path
    selection.measured_plans.cache_clear()


@pytest.mark.parametrize("card", selection.MOST_ROWS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_plan_is_one_that_kernels_take(operator, card):
    for itemsize, most in selection.MOST_ROWS[card].items():
        for m in range(1, most + 1):
            for n, k in ((64, 64), (4096, 4096), (11008, 4096), (4096, 11008)):
                plan = checked(plan_for(operator, m, n, k, itemsize, card), operator)
                assert plan.rows >= rows_of(m)


def test_measured_plans_are_used_for_their_shape_alone(plans_file):
    plan = Plan(8, 64, 4, 4, 5, 2)
    save_plans(plans_file, {("nf4_linear", 4096, 4096, 8): plan})
    assert plan_for("nf4_linear", 3, 4096, 4096) == plan
    assert plan_for("nf4_linear", 3, 4096, 4096, itemsize=4) != plan  # measured in 16 bits
    assert plan_for("nf4_linear", 3, 4096, 4160) != plan


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"version": 2, "plans": []}', '{"version": 1, "plans": [{}]}',
        '{"version": 1, "plans": 3}',
        *(
            json.dumps({"version": 1, "plans": [
                {"operator": operator, "n": 64, "k": 64, "rows": 8, "plan": plan}
            ]})
            for operator, plan in (
                ("nf4_linear", [8, 31, 4, 4, 3, 1]), ("nf4_linear", [8, 32, 2, 4, 3, 1]),
                ("nf4_linear", [8, 32, 4, 4]), ("nf4_linear", [8, 32, 4, 4, 3, 10**9]),
                ("nf4_linear", [8, "32", 4, 4, 3, 1]), ("a_product", [8, 32, 4, 4, 3, 1]),
                ("nf4_linear_input_gradient", [16, 16, 4, 4, 3, 1]),  # sums of 16: wrong numbers
            )
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_ignored_with_a_warning(plans_file, text):
    plans_file.write_text(text)
    with pytest.warns(UserWarning, match="is ignored: .*benchmarks gpu --tune"):
        assert plan_for("nf4_linear", 1, 64, 64) == Plan(8, 32, 4, 4, 4, 1)


def test_a_file_that_is_not_there_is_a_warning(plans_file):
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        plan_for("nf4_linear", 1, 64, 64)
