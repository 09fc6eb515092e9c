"""Tensor-parallel layers: against one process that has the whole model.

The comparisons are in float64, where a wrong term cannot hide in a tolerance.  Cut sums are added
in another order; that changes each by at most (terms) * eps of the sum of magnitudes.  The longest
way from an input to a gradient multiplies by all matrices there and back: LONGEST terms at most,
and a factor of 16 is left for what the differences do in silu, softmax and norms on the way.
"""

import json

import pytest
import torch

from tests.model.tensor_parallel_cases import KINDS
from tests.processes import run_together

EPS = {"64": torch.finfo(torch.float64).eps, "32": torch.finfo(torch.float32).eps}
MLP_TERMS = 3 * (80 + 256 + 6 + 4)  # forward, gradient of inputs, gradient of factors
LLAMA_TERMS = 3 * 2 * (3 * 128 + 256 + 2 * 14)  # and two layers


def run(tmp_path, n, *cases):
    """What each process found, by case."""
    printed = run_together("tests.model.tensor_parallel_cases", n, tmp_path, *cases)
    return json.loads(printed.strip().splitlines()[-1])


def largest(found):
    """The largest number in what `compared` found."""
    return max(max(worst.values()) for worst in found.values())


def check_mlp(every, n, kind, tolerance):
    """One kind of MLP in every process; returns the largest difference."""
    for found in every:
        assert found["names"] == ["gate", "up", "down"]
        factors = {"plain": 0, "stack": 12, "dense dora": 8, "nf4 dora": 8}
        key = "plain" if kind.startswith("plain") else "stack" if "stacked" in kind else kind
        assert found["gradients"] == factors.get(key, 6)
        assert largest(found["worst"]) <= tolerance
        assert largest(found["checkpointed"]) <= tolerance
        assert found["copied"] <= tolerance
        assert found.get("disabled", 0.0) <= tolerance
        here, everywhere = found["codes"]
        assert here * n == everywhere
        assert (everywhere > 0) == ("nf4" in kind)
    return max(largest(found["worst"]) for found in every)


def test_mlps_compute_and_train_as_in_one_process(tmp_path, capsys):
    cases = [*(f"mlp:{kind}" for kind in KINDS), "mlp float32:nf4"]
    every = run(tmp_path, 2, *cases)
    for case in cases:
        dtype, kind = "32" if "float32" in case else "64", case.partition(":")[2]
        tolerance = 16 * MLP_TERMS * EPS[dtype]
        worst = check_mlp([found[case] for found in every], 2, kind, tolerance)
        with capsys.disabled():
            print(f"\n2 processes, {case}: off by {worst:.1e}, allowed {tolerance:.1e}", end="")
    # 256 rows of 64 weights are 512 blocks of 32: two groups of scales, one for each process
    assert every[0]["mlp:nf4"]["double_quant"] == [True, False]
    assert every[0]["mlp:nf4 flat"]["double_quant"] == [False, False]  # 640 blocks: cut at 320


def test_a_small_llama_computes_and_trains_as_in_one_process(tmp_path, capsys):
    pytest.importorskip("transformers")
    cases = ["llama:dense", "llama:nf4", "llama float32:nf4"]
    every = run(tmp_path, 2, *cases)
    check_llama(every, 2, cases, capsys)


def check_llama(every, n, cases, capsys):
    """Logits and 28 gradients, before and after a step."""
    for case in cases:
        tolerance = 16 * LLAMA_TERMS * EPS["32" if "float32" in case else "64"]
        for found in every:
            assert found[case]["gradients"] == 28
            assert largest(found[case]["worst"]) <= tolerance
            here, everywhere = found[case]["codes"]
            assert here * n == everywhere
            assert (everywhere > 0) == ("nf4" in case)
        worst = max(largest(found[case]["worst"]) for found in every)
        with capsys.disabled():
            print(f"\n{n} processes, {case}: off by {worst:.1e}, allowed {tolerance:.1e}", end="")


PROCESS = "tensor parallel, process 0 of 2: "
REFUSED = {  # what an error begins with, after its class and (but for the last lines) PROCESS
    "odd": "ValueError: down: ColwiseParallel: LoRALinear (65, 256) has out_features=65, which 2 "
    "processes do not divide",
    "block": "ValueError: down: RowwiseParallel: a cut of NF4Linear (64, 96) in blocks of 32 at 48 "
    "of its 96 columns is inside a block; the nearest that it may be cut at are 32 and 64",
    "flat columns": "ValueError: gate: RowwiseParallel: NF4Linear (256, 80) in blocks of 32 has "
    "blocks that run over the ends of rows",
    "by torch": "ValueError: RowwiseParallel: a cut of NF4Linear",
    "dora": "TypeError: up: RowwiseParallel: DoRALinear has lengths",
    "merged": "ValueError: up: ColwiseParallel: LoRALinear is merged",
    "trainable": "ValueError: up: ColwiseParallel: NF4Linear has trainable parameters",
    "other kind": "TypeError: 0: ColwiseParallel: LayerNorm; expected nn.Linear, NF4Linear or",
    "no match": "ValueError: 'upp' matches no module",
    "no style": "TypeError: 'up': expected a ParallelStyle, got str",
    "twice named": "ValueError: 'u*' and 'up' both match 'up'",
    "meta": "ValueError: up: ColwiseParallel: LoRALinear is on the meta device",
    "again": "ValueError: up: ColwiseParallel: LoRALinear is sharded or cut already",
    "missing layer": "ValueError: tensor parallel, process 1 of 2: 'up' matches no module",
    "other rank": "ValueError: tensor parallel: process 1 of 2 has another model or plan than "
    "process 0: up ",
    "inject after": "ValueError: inject_lora: the parameters of up are shards (DTensor)",
}


def test_what_cannot_be_cut_is_refused_everywhere_and_changes_nothing(tmp_path):
    every = run(tmp_path, 2, "refusals")
    for found in every:
        assert set(found["refusals"]) == set(REFUSED)
        for what, (text, unchanged) in found["refusals"].items():
            assert text.replace(PROCESS, "").startswith(REFUSED[what]), text
            assert unchanged, what


def test_exceptions_layouts_and_dropout(tmp_path):
    for found in (one["behaviours"] for one in run(tmp_path, 2, "behaviours")):
        assert len(found["raised"]) == 2
        assert found["after an exception"] == [True, 64, 256, 256]
        assert found["by keyword"] == "ColwiseParallel: give the input by position"
        assert found["dropped"] == 0  # one sum, sent to all
        assert len(found["layouts"]) == 2 + 6
        assert max(found["layouts"]) <= 16 * MLP_TERMS * EPS["64"]


@pytest.mark.slow
def test_four_processes(tmp_path, capsys):
    pytest.importorskip("transformers")
    cases = ["llama:dense", "llama:nf4"]
    kinds = [kind for kind in KINDS if "flat" not in kind]
    every = run(tmp_path, 4, *cases, *(f"mlp:{kind}" for kind in kinds))
    check_llama(every, 4, cases, capsys)
    for kind in kinds:
        check_mlp([found[f"mlp:{kind}"] for found in every], 4, kind, 16 * MLP_TERMS * EPS["64"])
