"""The claims job: the rules by hand, which run comes next, a state file that was cut, the page."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from benchmarks import claims, claims_methods, claims_page, claims_queue, claims_rules
from benchmarks.claims_advice import ADVICE
from benchmarks.claims_arms import ARMS, BY_NAME, HIGHER_IS_BETTER, PARTS, SEEDS, Arm, rates
from benchmarks.claims_queue import Run
from benchmarks.claims_rules import CLAIMS, FAILS, HOLDS, NOT_RUN, OPEN, Claim

LORA, FULL = "ner: LoRA", "ner: full"


def runs(scores, rate=None):
    """The runs of arms whose seeds have these test scores; the first rate is the best."""
    done = {}
    for name, values in scores.items():
        arm = BY_NAME[name]
        best = rate or arm.rates[min(1, len(arm.rates) - 1)]
        worst = 0.0 if HIGHER_IS_BETTER[arm.task] else 99.0
        for each in arm.rates:
            done[Run(name, each, 0)] = {"valid": worst, "test": worst}
        good = 1.0 if HIGHER_IS_BETTER[arm.task] else 1e-3
        for seed, value in zip(SEEDS, values, strict=True):
            done[Run(name, best, seed)] = {
                "valid": good, "test": value, "seconds": 1.0, "trainable": 7, "text": value,
                "error_gaussian": value, "error_minilm": value, "error_smollm2": value,
            }  # fmt: skip
    return done


# --- the arms and the claims ---


def test_names_are_unique_and_parts_known():
    assert len(BY_NAME) == len(ARMS)
    assert {arm.part for arm in ARMS} == set(PARTS)
    assert {arm.task for arm in ARMS} == set(HIGHER_IS_BETTER)


def test_every_claim_names_arms_of_one_task_and_every_arm_has_a_claim():
    for claim in CLAIMS:
        assert len(claim.arms) == (4 if claim.rule == "gap grows" else 2), claim
        assert len({BY_NAME[name].task for name in claim.arms}) == 1, claim
    used = {name for claim in CLAIMS for name in claim.arms}
    # shown in the tables without a claim of their own
    assert {arm.name for arm in ARMS} - used == {"types: Int8", "types: NF4, blocks of 1024"}


def test_arms_of_the_layers_part_have_as_many_parameters():
    """Of one of MiniLM's layers: four of 384 x 384, two of 384 x 1536."""
    attention, mlp = 4 * (384 + 384), 2 * (384 + 1536)
    every = BY_NAME[LORA].settings["rank"] * (attention + mlp)
    assert BY_NAME["layers: LoRA, attention, rank 36"].settings["rank"] * attention == every
    other = BY_NAME["layers: LoRA, MLP, rank 29"].settings["rank"] * mlp
    assert abs(other / every - 1) < 0.01  # no whole rank gives the same number; 28 is further off


# --- the rules ---


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    # standard deviation of (x - 0.01, x, x + 0.01): 0.01, of both: 0.02
    [(0.80, 0.77, HOLDS), (0.80, 0.785, OPEN), (0.785, 0.80, OPEN), (0.77, 0.80, FAILS)],
)
def test_better_needs_a_difference_above_both_deviations(a, b, expected):
    done = runs({LORA: (a - 0.01, a, a + 0.01), FULL: (b - 0.01, b, b + 0.01)})
    said, scores = claims_rules.verdict(Claim("", "", "better", (LORA, FULL)), done)
    assert said == expected
    assert [round(s.spread, 6) for s in scores] == [0.01, 0.01]


@pytest.mark.parametrize(
    ("behind", "expected"),
    # margin 0.02; the deviations of both together are 0.01
    [(0.005, HOLDS), (-0.5, HOLDS), (0.015, OPEN), (0.025, OPEN), (0.035, FAILS)],
)
def test_as_good_as_allows_a_margin(behind, expected):
    b = 0.8
    a = b - behind
    done = runs({LORA: (a - 0.005, a, a + 0.005), FULL: (b - 0.005, b, b + 0.005)})
    assert claims_rules.MARGINS["ner"] == 0.02
    said, _ = claims_rules.verdict(Claim("", "", "no worse", (LORA, FULL)), done)
    assert said == expected


def test_a_smaller_loss_is_better():
    done = runs({"chat: LoRA": (3.5, 3.5, 3.5), "chat: full": (3.6, 3.6, 3.6)})
    arms = ("chat: LoRA", "chat: full")
    assert claims_rules.verdict(Claim("", "", "better", arms), done)[0] == HOLDS
    assert claims_rules.verdict(Claim("", "", "better", arms[::-1]), done)[0] == FAILS


def test_a_smaller_error_is_better_whatever_the_task():
    done = runs({"types: NF4": (0.1, 0.1, 0.1), "types: Int4": (0.2, 0.2, 0.2)})
    claim = Claim("", "", "better", ("types: NF4", "types: Int4"), "error_gaussian")
    assert claims_rules.verdict(claim, done)[0] == HOLDS


@pytest.mark.parametrize(("later", "expected"), [(0.6, HOLDS), (0.7, FAILS), (0.65, OPEN)])
def test_a_gap_grows_from_the_first_pair_to_the_second(later, expected):
    same = {FULL: 0.8, LORA: 0.75, "batches: full, batch 64": 0.7, "batches: LoRA, batch 64": later}
    done = runs({name: (v - 1e-3, v, v + 1e-3) for name, v in same.items()})
    arms = (LORA, FULL, "batches: LoRA, batch 64", "batches: full, batch 64")
    assert claims_rules.verdict(Claim("", "", "gap grows", arms), done)[0] == expected


def test_rates_are_compared_as_a_ratio():
    done = runs({LORA: (0.8,) * 3, FULL: (0.8,) * 3})
    ratio = BY_NAME[LORA].rates[1] / BY_NAME[FULL].rates[1]
    for between, expected in (((ratio / 2, ratio * 2), HOLDS), ((ratio * 2, ratio * 3), FAILS)):
        claim = Claim("", "", "rates", (LORA, FULL), between=between)
        assert claims_rules.verdict(claim, done)[0] == expected


def test_without_a_seed_a_claim_is_not_run():
    done = runs({LORA: (0.8,) * 3, FULL: (0.8,) * 3})
    del done[Run(LORA, BY_NAME[LORA].rates[1], 2)]
    said, scores = claims_rules.verdict(Claim("", "", "better", (LORA, FULL)), done)
    assert (said, scores) == (NOT_RUN, [])


def test_a_run_without_a_number_counts_as_the_worst_and_gives_no_score():
    done = runs({LORA: (0.8, 0.8, None)})
    assert claims_rules.score(LORA, done) is None
    assert claims_queue.better("ner", 0.1, None) and not claims_queue.better("ner", None, 0.1)
    assert not claims_queue.better("chat", None, None)
    assert claims_queue.better("chat", 1.0, 2.0) and claims_queue.better("ner", 2.0, 1.0)


# --- which run comes next ---


def played(arm, valid):
    """All runs of an arm in order, with `valid` as the score of a rate."""
    done, order = {}, []
    while missing := claims_queue.wanted(arm, done):
        order.append(missing[0])
        done[missing[0]] = {"valid": valid(missing[0].rate)}
    return order, done


def test_a_best_rate_in_the_middle_ends_the_search():
    arm = Arm("x", "ner", "ner", "lora", rates(1e-3))
    order, done = played(arm, lambda rate: -abs(rate - 1e-3))
    assert [(r.rate, r.seed) for r in order] == [
        (0.000316, 0), (0.001, 0), (0.00316, 0), (0.001, 1), (0.001, 2)
    ]  # fmt: skip
    assert claims_queue.chosen_rate(arm, done) == 0.001


@pytest.mark.parametrize(("best", "more"), [(1e-2, 0.00999), (1e-4, 0.0000999)])
def test_a_best_rate_at_an_edge_adds_one_beyond_it(best, more):
    arm = Arm("x", "ner", "ner", "lora", rates(1e-3))
    order, done = played(arm, lambda rate: -abs(rate - best))
    assert len(order) == 6
    assert order[3] == Run("x", pytest.approx(more, rel=0.02), 0)
    assert claims_queue.chosen_rate(arm, done) == order[3].rate


def test_a_worse_rate_beyond_the_edge_is_not_taken():
    arm = Arm("x", "chat", "chat", "lora", rates(1e-3))  # a loss: less is better
    order, done = played(arm, lambda rate: abs(rate - 0.00316))
    assert order[3].rate > 0.00316
    assert claims_queue.chosen_rate(arm, done) == 0.00316


def test_an_arm_with_one_rate_is_not_tuned():
    order, _ = played(BY_NAME["types: NF4"], lambda rate: 1.0)
    assert [run.seed for run in order] == list(SEEDS)


def test_a_cut_line_of_the_state_file_is_run_again_and_other_sizes_are_refused(tmp_path):
    path = tmp_path / "state.jsonl"
    sizes = {"ner": {"train": 1}}
    whole = {"arm": LORA, "rate": 1e-3, "seed": 0, "sizes": {"train": 1}, "valid": 0.5}
    path.write_text(json.dumps(whole) + "\n" + json.dumps({**whole, "seed": 1})[:30])
    assert claims_queue.read(path, sizes) == {Run(LORA, 1e-3, 0): whole}
    with pytest.raises(ValueError, match="give another --state"):
        claims_queue.read(path, {"ner": {"train": 2}})
    assert claims_queue.read(tmp_path / "none", sizes) == {}


# --- methods ---


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def test_rates_of_head_a_and_b():
    arm = Arm("x", "ner", "ner", "lora", (1.0,), {"rank": 2, "alpha": 2, "plus": 16.0})
    model = small()
    claims_methods.prepare(model, arm, ["0"], "2")
    groups = claims_methods.groups_of(model, arm, 1e-3, "2", 5e-3)
    assert [group["lr"] for group in groups] == [5e-3, 16e-3, 1e-3]
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [18, 16, 16]


def test_full_fine_tuning_trains_everything_and_head_only_its_head():
    for method, expected in (("full", 8 * 8 + 8 + 18), ("head", 18)):
        model = small()
        arm = Arm("x", "ner", "ner", method, (1.0,))
        if method == "head":
            claims_methods.prepare(model, arm, ["0"], "2")
        groups = claims_methods.groups_of(model, arm, 1e-3, "2", 5e-3)
        assert sum(p.numel() for group in groups for p in group["params"]) == expected
    assert groups[0]["lr"] == 1e-3  # of the head alone it is the rate that is searched


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='lore'"):
        claims_methods.prepare(small(), Arm("x", "ner", "ner", "lore", (1.0,)), ["0"], None)


def test_training_that_diverges_ends_early():
    model = small()
    found = claims_methods.train(
        model, [{"params": list(model.parameters()), "lr": 1.0}], 20,
        lambda step: model(torch.ones(1, 8)).sum() * (float("nan") if step == 3 else 1.0),
    )  # fmt: skip
    assert (found["steps"], found["finite"], found["train_loss"]) == (4, False, None)


# --- the page ---


def result(done):
    sizes = {task: size._asdict() for task, size in claims.SIZES.items()}
    entries = [{**run._asdict(), "seconds": 1.0, "processor": "a CPU, AVX2", "trainable": 7,
                **found} for run, found in done.items()]  # fmt: skip
    entries[-1]["processor"] = "another, AVX512"
    return {"sizes": sizes, "runs": entries}


def test_the_page_shows_scores_and_what_was_not_run(tmp_path):
    found = result(runs({LORA: (0.8, 0.81, 0.82), FULL: (0.7, 0.71, 0.72)}))
    (tmp_path / "assets").mkdir()
    claims_page.write(found, "claims-x.json", tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert "LoRA 0.810 ± 0.010; full 0.710 ± 0.010" in text
    assert (
        f"- a CPU, AVX2: {len(found['runs']) - 1} runs; another, AVX512: 1 runs; 0.0 hours" in text
    )
    listed = text.partition("the time was over: ")[2].partition(".\n")[0].split("; ")
    assert set(listed) == set(BY_NAME) - {LORA, FULL}
    assert (tmp_path / "assets" / "claims.png").stat().st_size > 1000


def test_a_sentence_with_an_arm_that_was_not_run_is_refused():
    done = runs({LORA: (0.8, 0.81, 0.82)})
    assert claims_page.with_scores("<ner: LoRA> of F1", done) == "0.810 ± 0.010 of F1"
    with pytest.raises(ValueError, match="was not run"):
        claims_page.with_scores("<ner: full>", done)


def test_docs_claims_is_what_its_result_gives():
    path = sorted(claims.RESULTS.glob("claims-2*.json"))[-1]
    found = json.loads(path.read_text())
    assert (claims_page.DOCS / "claims.md").read_text() == claims_page.page(found, path.name)
    assert found["claims"] == claims_page.verdicts(claims_page.runs_of(found))
    assert (claims_page.DOCS / claims_page.FIGURE).exists()


def test_page_without_a_result_says_so(tmp_path, capsys):
    assert claims.main(["--page", "--output", str(tmp_path)]) == 2
    assert "run the job first" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path):
    state = Path(tmp_path) / "state.jsonl"
    words = ["--quick", "--workers", "1", "--output", str(tmp_path), "--state", str(state)]
    assert claims.main(words) == 0
    lines = state.read_text().splitlines()
    assert claims.main(words) == 0  # all is done: nothing is run again
    assert state.read_text().splitlines() == lines
    found = json.loads(sorted(tmp_path.glob("claims-*.json"))[-1].read_text())
    said = {row["claim"]: row["verdict"] for row in found["claims"] if row["task"] == "entities"}
    assert said["LoRA is as good as full fine-tuning"] != NOT_RUN
    assert said["DoRA is better than LoRA"] == NOT_RUN


def test_every_arm_in_the_advice_exists():
    names = [name for text in sum(ADVICE, ()) for name in re.findall(r"<([^>]+)>", text)]
    assert names and set(names) <= set(BY_NAME)


def test_advice_is_left_out_with_the_arms_that_it_rests_on():
    done = runs({LORA: (0.8,) * 3, FULL: (0.7,) * 3, "ner: head only": (0.6,) * 3})
    (said,) = claims_page.advice(done)  # of seven
    assert said.startswith("- **Begin with LoRA") and "0.600 ± 0.000" in said
    assert "conversations" not in said
    # the second sentence of an advice does not stand alone
    assert claims_page.advice(runs({"chat: DoRA": (3.0,) * 3, "chat: LoRA": (3.0,) * 3})) == []
