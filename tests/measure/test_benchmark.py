"""minipeft.benchmark on a model of one's own: figures, refusals, scripts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.fast.flops import product_flops
from minipeft.measure import METHODS, gate, loss, processes, run
from minipeft.measure.machine import allocator_environment
from minipeft.measure.methods import chosen
from minipeft.measure.processes import CHILD, in_a_process
from minipeft.measure.report import Report, digits
from tests.measure import own_gpt

ROOT = Path(__file__).parents[2]
SETTINGS = {"target": "all-linear", "head": "head", "rank": 4, "alpha": 4, "prefix_length": 3}


def case(method, **changes):
    made = {"make_model": own_gpt.make_model, "make_batch": own_gpt.make_batch,
            "loss": own_gpt.loss, "steps": 3, "settings": SETTINGS}  # fmt: skip
    return run.Case(METHODS[method], **{**made, **changes})


def silent(kind, values):
    """Nothing is shown."""


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_the_figures_of_a_run(method):
    found = run.run(case(method))
    model = own_gpt.make_model()
    own = sum(p.numel() for p in model.parameters())
    if method == "full":
        assert found["trainable_parameters"] == own
    elif method != "dora":
        inside = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
        sizes = [m.in_features + m.out_features for m in inside]
        assert found["trainable_parameters"] == 4 * sum(sizes)
    assert found["no_prediction"] is None
    assert found["predicted_bytes"] > found["weight_bytes"]
    assert 0 <= found["step_peak_bytes"] <= found["peak_bytes"], (
        "memory of this process is used again"
    )
    assert len(found["step_seconds"]) == len(found["train_losses"]) == 3
    assert found["train_losses"][0] != found["train_losses"][1]
    assert (found["bits_per_quantized_weight"] is not None) == (method == "qlora")
    assert (
        found["weight_bytes"] < 4 * own if method == "qlora" else found["weight_bytes"] >= 4 * own
    )


def test_flops_are_those_counted_by_hand():
    """Forward, and in backward the gradient of each input and of what trains."""
    lora, qlora, full = (run.run(case(name))["flops"] for name in ("lora", "qlora", "full"))
    tokens, width, length, heads, rank = 2 * own_gpt.LENGTH, own_gpt.WIDTH, own_gpt.LENGTH, 4, 4
    sizes = [(width, 3 * width), (width, width), (width, 2 * width), (2 * width, width)]
    products = 2 * tokens * 2 * sum(i * o for i, o in sizes)
    head = 2 * tokens * width * own_gpt.VOCABULARY
    attention = 2 * 4 * 2 * heads * length * length * (width // heads)  # two blocks, two texts
    assert full == 3 * products + 3 * head + 3.5 * attention
    factors = 2 * tokens * rank * 2 * sum(i + o for i, o in sizes)
    # the embedding is frozen: the first block's qkv has no gradient of its input to give, neither
    # through its weight nor through its A
    first = 2 * tokens * (3 * width * width + rank * width)
    assert lora == 2 * products + 2 * head + 3 * factors + 3.5 * attention - first
    assert lora == qlora


def test_a_model_that_cannot_take_a_method_says_why():
    found = in_a_process(case("ptuning"), silent)
    assert "unsupported" in found
    assert "attach_prefix" in found["unsupported"] or "attention" in found["unsupported"]


def test_what_goes_wrong_in_a_process_is_said():
    assert "OSError: no data at step 0" in in_a_process(
        case("lora", make_batch=own_gpt.broken_batch), silent)["failed"]  # fmt: skip
    assert "exit status 7" in in_a_process(case("lora", make_model=own_gpt.dies), silent)["failed"]
    found = in_a_process(case("lora", loss=loss.own_loss), silent)
    assert "give benchmark a function" in found["failed"] and found["for_every_method"]
    found = in_a_process(case("lora", make_batch=own_gpt.broken_batch), silent)
    assert "in broken_batch" in found["traceback"]
    with pytest.raises(gate.GateError, match="depends on nothing that trains"):
        run.run(case("lora", loss=own_gpt.of_the_batch_alone))


def test_one_step_is_two_so_that_the_first_can_warm_up():
    found = run.run(case("lora", steps=1))
    assert len(found["step_seconds"]) == 2
    assert found["step_peak_bytes"] is not None
    assert run.run(case("lora", steps=0))["step_seconds"] == []


@pytest.mark.slow
def test_a_dataloader_has_workers_in_the_process_of_a_method():
    assert "step_seconds" in in_a_process(case("lora", make_batch=own_gpt.loaded_batch), silent)


@pytest.mark.slow
def test_a_process_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(processes, "END_SECONDS", 0.5)
    heard = []
    found = in_a_process(case("lora", make_model=own_gpt.model_that_keeps_its_process),
                         lambda kind, values: heard.append((kind, values)))  # fmt: skip
    assert "step_seconds" in found
    assert "did not end within 0.5 s" in found["warnings"][0]
    assert heard[-1][0] == "warning"


def test_only_refusals_of_the_library_are_unsupported():
    methods = chosen({"friday": own_gpt.refuses, "rank": own_gpt.breaks_our_layer})
    cases = {name: replace(case("lora"), method=method) for name, method in methods.items()}
    with pytest.raises(ValueError, match="Friday") as friday:
        run.run(cases["friday"])
    assert not processes.refused_by_us(friday.value)
    with pytest.raises(ValueError, match="rank") as rank:
        run.run(cases["rank"])
    assert processes.refused_by_us(rank.value)
    with pytest.raises(TypeError) as pythons:  # raised inside a file of minipeft, by Python
        product_flops(None, out_shape=(1,))
    assert not processes.refused_by_us(pythons.value)


@pytest.mark.parametrize(("value", "said"), [
    (0.01234, "0.0123"), (0.5, "0.500"), (9.87654, "9.88"), (98.76, "98.8"), (1234.5, "1,234"),
    (0, "0"), (None, "-"), (float("nan"), "nan"),
])  # fmt: skip
def test_figures_have_three_significant_digits(value, said):
    assert digits(value) == said


def test_the_footer_says_why_there_is_no_prediction_and_which_rounds_count():
    entry = {"title": "LoRA", "peer": None, "is_peer": False}
    figures = {"method": "lora", "trainable_parameters": 1, "weight_bytes": 4_000,
               "bits_per_quantized_weight": None, "train_losses": [1.0, 0.5]}  # fmt: skip
    setting = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    runs = [
        {**figures, "round": 0, "step_seconds": [9.0, 8.0], "allocator": setting, "threads": 1,
         "peak_bytes": 2_000_000, "step_peak_bytes": 1_000_000, "no_prediction": "it reads\nvalues",
         "predicted_bytes": None},
        {**figures, "round": 1, "step_seconds": [2.0, 1.0], "allocator": {}, "threads": 1,
         "peak_bytes": 7_000_000, "step_peak_bytes": 6_000_000},
    ]  # fmt: skip
    data = {"methods": {"lora": entry}, "runs": runs, "about": "x", "hardware": {"processor": "p"},
            "options": {"device": "cpu", "rounds": 2}}  # fmt: skip
    text = str(Report(data))
    row = text.splitlines()[1].split()
    assert {"2.00", "1.00", "0.00400"} <= set(row) and "7.00" not in row
    assert "1.00 (1.00-1.00)" in text, "the second round's time"
    assert "no prediction: it reads values (LoRA)" in text
    assert "memory: the first round, with MALLOC_MMAP_THRESHOLD_=65536; times: the later" in text
    one = str(Report({**data, "runs": runs[:1]}))
    assert "which makes steps slower" in one and "8.00 (8.00-8.00)" in one


def test_a_report_of_two_rounds(tmp_path, capsys):
    report = mp.benchmark(
        own_gpt.make_model, own_gpt.make_batch,
        {"full": None, "qlora": None, "mine": own_gpt.body_only, "ptuning": None},
        loss=own_gpt.that_reads_values, device=torch.device("cpu"), head="head", rank=4,
        steps=2, rounds=2, threads=1,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("steps in") == 6 and "unsupported" not in report.runs("mine")[0]
    assert "P-tuning v2" in said, "a line for each run"
    assert len(report.runs("ptuning")) == 1 and len(report.runs("full")) == 2
    text = str(report)
    assert said.count("UserWarning") == 0
    assert "no prediction: " in text and "predicted MB" not in text and "step MB" in text
    first, second = report.runs("full")
    assert first["allocator"] == allocator_environment() and second["allocator"] == {}
    assert 0 < first["step_peak_bytes"] <= first["peak_bytes"]
    assert report.timed("full") == ([second] if first["allocator"] else [first, second])
    assert "unsupported: " in text and "GFLOPs" in text and "make_model, 2 steps, rank 4" in text
    assert report.ratio("full", "full") == ("1.00" if first["allocator"] else "1.00 (1.00-1.00)")
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["methods"]["mine"]["title"] == "mine"
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000
    pytest.importorskip("rich")
    report.show()
    assert "full fine-tuning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"methods": ["lorra"]}, "no method 'lorra'; one of"),
        ({"methods": "lora"}, "a list of names"),
        ({"methods": []}, "a list of names"),
        ({"steps": 0}, "steps=0"),
        ({"threads": -1}, "threads=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"make_model": lambda: own_gpt.GPT()}, "able to import make_model"),
        ({"make_batch": partial(lambda step: step)}, "able to import make_batch"),
        ({"loss": lambda model, batch: 0}, "able to import loss"),
        ({"methods": {"mine": lambda model: None}}, "able to import the method 'mine'"),
        ({"make_model": own_gpt.GPT()}, "make_model is a GPT; give a function"),
        ({"device": "kitchen"}, "device='kitchen'"),
        ({"device": torch.device("cuda", 99)}, "'cuda:99'; torch sees"),
        ({"device": "meta"}, "computes nothing"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_process(changes, why, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(processes, "in_a_process", started)
    given = {"make_model": own_gpt.make_model, "make_batch": own_gpt.make_batch, **changes}
    with pytest.raises((ValueError, TypeError), match=why):
        mp.benchmark(**given)


WRONG = """
import minipeft as mp
from tests.measure import own_gpt
for wrong in ({"methods": 3}, {"rounds": 1.5}, {"make_batch": None}, {"device": 0}):
    try:
        mp.benchmark(**{"make_model": own_gpt.make_model, "make_batch": own_gpt.make_batch} | wrong)
    except (ValueError, TypeError) as error:
        print(error)
"""


def test_values_of_another_type_are_refused_in_words(plain_python):
    methods, rounds, batch, device = plain_python(WRONG).strip().splitlines()
    assert "methods is a int; expected a list of names" in methods
    assert "rounds=1.5" in rounds
    assert "make_batch=None; expected a function" in batch
    assert "device=0; expected a name or a torch.device" in device


@pytest.mark.parametrize(
    ("function", "why"),
    [(own_gpt.losses_of_rows, r"shape \(2, 15\)"), (own_gpt.infinite, "loss is inf")],
)
def test_a_loss_that_no_method_can_train_on_is_refused(function, why):
    with pytest.raises(loss.LossError, match=why):
        run.run(case("lora", loss=function))


@pytest.mark.slow
def test_such_a_loss_ends_the_comparison_after_its_first_process(capsys):
    with pytest.raises(ValueError, match="benchmark: loss has the shape"):
        mp.benchmark(own_gpt.make_model, own_gpt.make_batch, ["full", "lora"], rounds=1,
                     loss=own_gpt.losses_of_rows, threads=1)  # fmt: skip
    assert capsys.readouterr().err.count("round 1") == 1


def test_what_is_no_tensor_or_no_floating_number_is_no_loss():
    for wrong, why in ((3.0, "a float"), (torch.tensor(3), "torch.int64")):
        with pytest.raises(loss.LossError, match=why):
            loss.checked(wrong)


@pytest.mark.slow
def test_a_warning_of_several_processes_is_shown_once(capsys):
    report = mp.benchmark(
        own_gpt.model_that_warns, own_gpt.make_batch, ["full", "lora"], loss=own_gpt.loss,
        head="head", steps=1, rounds=1, threads=1,
    )  # fmt: skip
    assert capsys.readouterr().err.count("the head is not tied") == 1
    assert all("UserWarning: the head is not tied" in r["warnings"] for r in report.data["runs"])


def test_a_script_without_its_guard_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(CHILD, "1")
    with pytest.raises(RuntimeError, match="__name__"):
        mp.benchmark(own_gpt.make_model, own_gpt.make_batch)


@pytest.mark.slow
def test_a_script_of_eight_lines(tmp_path):
    script = tmp_path / "compare.py"
    script.write_text(
        "import minipeft as mp\n"
        "from tests.measure.own_gpt import loss, make_batch, make_model\n"
        "\n"
        "def model():\n"
        "    return make_model()\n"
        "\n"
        "GUARD\n"
        "    print(mp.benchmark(model, make_batch, ['full', 'lora'], loss=loss, head='head',\n"
        "                       steps=2, rounds=1))\n"
    )
    text = script.read_text()
    for guard, fine in (('if __name__ == "__main__":', True), ("if True:", False)):
        script.write_text(text.replace("GUARD", guard))
        done = subprocess.run(
            [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "full fine-tuning" in done.stdout
        assert ("if __name__" in done.stdout + done.stderr) is not fine


def test_dropout_of_the_models_own_does_not_fail_the_gate():
    torch.manual_seed(0)
    found = run.run(case("lora", make_model=with_dropout))
    assert found["trainable_parameters"] > 0


def with_dropout():
    model = own_gpt.make_model()
    model.blocks.append(nn.Dropout(0.5))
    return model
