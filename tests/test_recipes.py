"""The recipes: each runs and keeps its assertions; labels, beside those of a slow reference."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import recipes
from examples.recipes.common import (
    IGNORED,
    TEMPLATES,
    Template,
    batch,
    encode_turns,
    mean_loss,
    tiny_llama,
    train,
    train_tokenizer,
)
from tests.test_house import code_lines

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "recipes"
SHARED = {"common", "glm"}
RECIPES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)
SYSTEMS = {
    "alpaca", "alpaca_lora", "aquila", "chatglm", "chinese_llama_alpaca", "chinese_vicuna",
    "falcon", "guanaco", "luotuo", "moss", "openbuddy_falcon", "pandagpt", "tigerbot", "vicuna",
    "visualglm",
}  # fmt: skip
TURNS = ["Hi there! ", "Hello,  how are you?", "Fine.", "Good \u201cto\u201d hear: 你好\n"]
SPECIAL = ("<unk>", "<s>", "</s>", "[gMASK]", "<bos>", "<eop>", "<eoh>", "<eom>")


def needs_talks():
    try:
        distribution("chitchat-dataset")
    except PackageNotFoundError:
        pytest.skip("needs chitchat-dataset, which is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    needs_talks()
    return train_tokenizer(*SPECIAL)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, tmp_path):
    needs_talks()
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 2 <= len(done.stdout.strip().splitlines()) <= 6, done.stdout


@pytest.mark.parametrize(("after", "status"), [(1.5, 0), (2.5, 1)])
def test_the_table_of_recipes_wants_losses_that_fall(after, status, tmp_path, monkeypatch):
    (tmp_path / "one.py").touch()
    (tmp_path / "common.py").touch()
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    monkeypatch.setattr(recipes, "run", lambda path: (3.2, f"4 layers, loss 2.0 -> {after}\n"))
    monkeypatch.setattr(sys, "argv", ["recipes", "--output", str(tmp_path)])
    assert recipes.main() == status
    assert f"| [one](one.py) | 3 | 2.0 > {after} |\n" in (tmp_path / "README.md").read_text()
    (file,) = tmp_path.glob("recipes-*.json")
    figures = {"one": {"seconds": 3.2, "losses": [[2.0, after]]}}
    assert json.loads(file.read_text())["recipes"] == figures


@pytest.mark.parametrize("words", [["--print-only"], ["--names", "one"]])
def test_a_part_of_the_recipes_leaves_the_page_as_it_was(words, tmp_path, monkeypatch):
    (tmp_path / "one.py").touch()
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    monkeypatch.setattr(recipes, "run", lambda path: (3.2, "loss 2.0 -> 1.5\n"))
    monkeypatch.setattr(sys, "argv", ["recipes", "--output", str(tmp_path), *words])
    assert recipes.main() == 0
    assert not (tmp_path / "README.md").exists()


def test_there_is_a_recipe_for_each_system():
    assert {path.stem for path in RECIPES} == SYSTEMS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_less_than_100_lines(path):
    assert len(path.read_text().splitlines()) < 100


def test_the_glm_module_has_less_than_120_lines_of_code():
    assert code_lines((FOLDER / "glm.py").read_text()) < 120


def answers_with_their_ends(template, turns):
    answers = [answer + template.answer[1] for answer in turns[1::2]]
    return [*answers[:-1], answers[-1] + template.end]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_marks_are_learnt_and_nothing_else(name, tokenizer):
    template = TEMPLATES[name]
    ids, labels = encode_turns(tokenizer, template, TURNS)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs, before = [], False
    for label in labels:
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if before else [*runs, [label]]
        before = label != IGNORED
    found = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    # a token may begin with the blank that stands before an answer
    assert [text.strip() for text in found] == [
        text.strip() for text in answers_with_their_ends(template, TURNS)
    ]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    expected = template.header
    for user, answer in zip(TURNS[::2], TURNS[1::2], strict=True):
        expected += template.user[0] + user + template.user[1]
        expected += template.answer[0] + answer + template.answer[1] + template.answer[2]
    assert text == expected + template.end


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_token_is_learnt_if_one_of_its_characters_is(name, tokenizer):
    """Character by character: those of the answers, found by counting what stands before them."""
    template = TEMPLATES[name]
    _, labels = encode_turns(tokenizer, template, TURNS)
    text, flags = template.header, [False] * len(template.header)
    for number, turn in enumerate(TURNS):
        if number % 2:
            parts = [(template.answer[0], False), (turn + template.answer[1], True),
                     (template.answer[2], False)]  # fmt: skip
        else:
            parts = [(template.user[0] + turn + template.user[1], False)]
        for part, flag in parts:
            text += part
            for _ in part:
                flags.append(flag)
    text, flags = text + template.end, [*flags, *[True] * len(template.end)]
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for label, (first, last) in zip(labels, spans, strict=True):
        learnt = False
        for place in range(first, last):
            learnt = learnt or flags[place]
        assert (label != IGNORED) == learnt


def test_guanaco_learns_to_stop_behind_the_whole_conversation(tokenizer):
    """QLoRA's collator: <s> and nothing, then the text and </s>."""
    start, stop = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    for everything in (False, True):
        ids, labels = encode_turns(tokenizer, TEMPLATES["guanaco"], TURNS, everything=everything)
        assert ids[0] == start and ids.count(stop) == 1 and ids[-1] == labels[-1] == stop


def test_counting_the_tokens_of_the_prompt_alone_is_off_where_a_token_crosses(tokenizer):
    """The reason for labels by characters: " the" is one token, and begins in the prompt."""
    template = Template("", ("", ""), (" th", "</s>", ""))
    ids, labels = encode_turns(tokenizer, template, ["b", "e end"])
    alone = len(tokenizer("b th", add_special_tokens=False).input_ids)
    learnt = [i for i, label in enumerate(labels) if label != IGNORED]
    assert learnt == [1, *range(2, len(ids))] and alone >= 2  # by count, " the" would be masked
    assert tokenizer.decode(ids[1]) == " the" and tokenizer.decode(ids[-1]) == "</s>"


def test_everything_learns_all_and_length_cuts_both(tokenizer):
    ids, labels = encode_turns(tokenizer, TEMPLATES["alpaca"], TURNS[:2], everything=True)
    assert ids == labels
    short = encode_turns(tokenizer, TEMPLATES["alpaca"], TURNS[:2], length=7)
    assert short[0] == ids[:7] and short[1] == [IGNORED] * 7


@pytest.mark.parametrize(
    ("name", "turn"),
    [("alpaca", "see ### Response: below"), ("alpaca", "an end</s> here"), ("vicuna", "a USER: x"),
     ("vicuna", "ASSISTANT:"), ("pandagpt", "a\n### Human: b"), ("moss", "<eom>"),
     ("chatglm", "a<bos>"), ("visualglm", TEMPLATES["visualglm"].user[0]), ("tigerbot", "<s>")],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1])
def test_a_turn_that_holds_a_separator_is_refused(name, turn, place, tokenizer):
    turns = ["good", "better"]
    turns[place] = turn
    with pytest.raises(ValueError, match=f"turn {place} holds .* which separates turns"):
        encode_turns(tokenizer, TEMPLATES[name], turns)


@pytest.mark.parametrize("turns", [[], ["a"], ["a", "b", "c"]])
def test_turns_come_in_pairs(turns, tokenizer):
    with pytest.raises(ValueError, match="expected pairs"):
        encode_turns(tokenizer, TEMPLATES["alpaca"], turns)


def test_a_batch_is_padded_on_the_right():
    found = batch([([5, 6, 7], [IGNORED, 6, 7]), ([8], [8])], pad=3)
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert found["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_train_takes_the_rates_of_the_schedule(schedule, monkeypatch):
    model, rates = tiny_llama(20), []
    step = torch.optim.AdamW.step

    def noted(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    data = [batch([([5, 6, 7], [5, 6, 7])])]
    before, after = train(model, data, lr=1e-3, faster=2, steps=6, schedule=schedule, warmup=0.3)
    assert after < before and after == mean_loss(model, data)
    falling = {
        "constant": [2e-3] * 4, "linear": [2e-3, 1.5e-3, 1e-3, 5e-4],
        "cosine": [2e-3, 1e-3 * (1 + 0.5**0.5), 1e-3, 1e-3 * (1 - 0.5**0.5)],
    }  # fmt: skip
    assert rates == pytest.approx([1e-3, 2e-3, *falling[schedule]])
