"""Tensor-parallel layers: against one process that has the whole model.

The comparisons are in float64, where a wrong term cannot hide in a tolerance.  Cut sums are added
in another order; a sum of n terms changes by at most n * eps of the sum of their magnitudes.  The
longest way from an input to a gradient goes through all matrices there and back: TERMS terms.
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
        if kind.startswith("plain dense"):
            assert "torch cut a plain Linear of this model" in found["pickled"]
            assert "save the adapter (save_peft)" in found["pickled"]
        else:
            assert found["pickled"] <= tolerance
        assert found.get("disabled", 0.0) <= tolerance
        assert found.get("removed", 0.0) <= tolerance
        here, everywhere = found["codes"]
        assert here * n == everywhere
        assert (everywhere > 0) == ("nf4" in kind)
    return max(largest(found["worst"]) for found in every), tolerance


def check(every, n, cases, capsys):
    """All cases in every process, each by its kind."""
    for case in cases:
        dtype, kind = "32" if "float32" in case else "64", case.partition(":")[2]
        here = [found[case] for found in every]
        if case.startswith("llama"):
            worst, tolerance = check_llama(here, n, kind, LLAMA_TERMS * EPS[dtype])
        else:
            worst, tolerance = check_mlp(here, n, kind, MLP_TERMS * EPS[dtype])
        with capsys.disabled():
            print(f"\n{n} processes, {case}: off by {worst:.1e}, allowed {tolerance:.1e}", end="")


def test_layers_compute_and_train_as_in_one_process(tmp_path, capsys):
    pytest.importorskip("transformers")
    cases = ["mlp:nf4 stacked", "mlp:nf4 flat", "mlp:dense dora", "llama:nf4"]
    every = run(tmp_path, 2, *cases)
    check(every, 2, cases, capsys)
    # 256 rows of 64 weights are 512 blocks of 32: two groups of scales, one for each process
    assert every[0]["mlp:nf4 stacked"]["double_quant"] == [True, False]
    assert every[0]["mlp:nf4 flat"]["double_quant"] == [False, False]  # 640 blocks: cut at 320


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_all_kinds(n, tmp_path, capsys):
    pytest.importorskip("transformers")
    kinds = [f"mlp:{kind}" for kind in [*KINDS, "nf4 compiled"] if n == 2 or kind != "nf4 flat"]
    cases = [*kinds, "mlp float32:nf4", "llama:dense", "llama:nf4", "llama float32:nf4"]
    check(run(tmp_path, n, *cases), n, cases, capsys)


def check_llama(every, n, kind, tolerance):
    """Logits and 28 gradients, before and after a step; returns the largest difference."""
    for found in every:
        assert found["gradients"] == 28
        assert largest(found["worst"]) <= tolerance
        here, everywhere = found["codes"]
        assert here * n == everywhere
        assert (everywhere > 0) == ("nf4" in kind)
    return max(largest(found["worst"]) for found in every), tolerance


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
    "prefix": "ValueError: parallelize: the model has a prefix",
    "no style": "TypeError: 'up': expected a ParallelStyle, got str",
    "twice named": "ValueError: 'u*' and 'up' both match 'up'",
    "meta": "ValueError: up: ColwiseParallel: LoRALinear is on the meta device",
    "again": "ValueError: up: ColwiseParallel: LoRALinear is sharded or cut already",
    "missing layer": "ValueError: tensor parallel, process 1 of 2: 'up' matches no module",
    "other rank": "ValueError: tensor parallel: process 1 of 2 has another model or plan than "
    "process 0: up ",
    "inject after": "ValueError: inject_lora: the parameters of up are shards (DTensor)",
}


def test_refusals_change_nothing_and_the_rest_of_what_a_cut_layer_does(tmp_path):
    for found in run(tmp_path, 2, "refusals", "behaviours"):
        assert set(found["refusals"]) == set(REFUSED)
        for what, (text, unchanged) in found["refusals"].items():
            assert text.replace(PROCESS, "").startswith(REFUSED[what]), text
            assert unchanged, what
        behaves = found["behaviours"]
        assert len(behaves["raised"]) == 2  # in forward; DTensors and sizes are back then
        assert behaves["after an exception"] == [True, 64, 256, 256]
        assert behaves["by keyword"] == "ColwiseParallel: give the input by position"
        assert behaves["dropped"] == 0  # one sum, sent to all
        assert len(behaves["layouts"]) == 2 + 6
        assert max(behaves["layouts"]) <= MLP_TERMS * EPS["64"]
