"""minipeft.benchmark on a model of one's own: figures, refusals, scripts."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.measure import METHODS, run
from minipeft.measure.processes import CHILD, in_a_process
from tests.measure import own_gpt

ROOT = Path(__file__).parents[2]
SETTINGS = {"target": "all-linear", "head": "head", "rank": 4, "alpha": 4, "prefix_length": 3}


def case(method, **changes):
    made = {"make_model": own_gpt.make_model, "make_batch": own_gpt.make_batch,
            "loss": own_gpt.loss, "steps": 3, "settings": SETTINGS}  # fmt: skip
    return run.Case(METHODS[method], **{**made, **changes})


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
    assert len(found["step_seconds"]) == len(found["train_losses"]) == 3
    assert found["train_losses"][0] != found["train_losses"][1]
    assert (found["bits_per_quantized_weight"] is not None) == (method == "qlora")
    assert (
        found["weight_bytes"] < 4 * own if method == "qlora" else found["weight_bytes"] >= 4 * own
    )


def test_lora_and_qlora_count_the_same_flops_by_hand():
    """Forward, and in backward the gradient of each input and of what trains."""
    lora, qlora, full = (run.run(case(name))["flops"] for name in ("lora", "qlora", "full"))
    assert lora == qlora
    assert lora < full


def test_a_model_that_cannot_take_a_method_says_why():
    found = in_a_process(case("ptuning"), print)
    assert "unsupported" in found
    assert "attach_prefix" in found["unsupported"] or "attention" in found["unsupported"]


def test_what_goes_wrong_in_a_process_is_said():
    assert "OSError: no data at step 0" in in_a_process(
        case("lora", make_batch=own_gpt.broken_batch), print)["failed"]  # fmt: skip
    assert "exit status 7" in in_a_process(case("lora", make_model=own_gpt.dies), print)["failed"]
    assert (
        "give benchmark a function"
        in in_a_process(case("lora", loss=run.own_loss), print)["failed"]
    )


def test_a_report_of_two_rounds(tmp_path, capsys):
    report = mp.benchmark(
        own_gpt.make_model, own_gpt.make_batch,
        {"full": None, "qlora": None, "mine": own_gpt.body_only, "ptuning": None},
        loss=own_gpt.loss, head="head", rank=4, steps=2, rounds=2, threads=1,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("steps in") == 6 and "unsupported" not in report.runs("mine")[0]
    assert "P-tuning v2" in said, "a line for each run"
    assert len(report.runs("ptuning")) == 1 and len(report.runs("full")) == 2
    text = str(report)
    assert "unsupported: " in text and "GFLOPs" in text and "make_model, 2 steps, rank 4" in text
    assert report.ratio("full", "full") == "1.00 (1.00-1.00)"
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
        ({"make_model": lambda: own_gpt.GPT()}, "able to import make_model"),
        ({"make_batch": partial(lambda step: step)}, "able to import make_batch"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(changes, why):
    given = {"make_model": own_gpt.make_model, "make_batch": own_gpt.make_batch, **changes}
    with pytest.raises(ValueError, match=why):
        mp.benchmark(**given)


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
