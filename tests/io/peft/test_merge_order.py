"""Adapters merged in order: as PEFT merges them one by one; what cannot be right is refused."""

import json

import pytest
import torch

import minipeft as mp
from minipeft.io.peft import CONFIG_NAME
from tests.io.peft.test_new_rows import resized
from tests.model.test_vocabulary import N, llama, logits, trained

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 7, 49, 3], [0, 22, 5, 5]])
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}


def chinese(path, model, rows, seed, **settings):
    """An adapter of PEFT over `model` with `rows` rows, trained; what merging it by PEFT gives."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **settings)
    theirs = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(path)
    return theirs.merge_and_unload()


@pytest.fixture
def two(tmp_path):
    """Chinese-LLaMA and Chinese-Alpaca in small, and the model that PEFT makes of both."""
    model = chinese(tmp_path / "llama", llama(), N + 3, 1, **WHOLE)
    model = chinese(tmp_path / "alpaca", model, N + 4, 2, **WHOLE)
    return tmp_path / "llama", tmp_path / "alpaca", model


def lora(path, targets=("q_proj",), **changes):
    """A LoRA of ours over LLaMA, trained and saved."""
    model = llama()
    torch.manual_seed(len(path.name) + ord(path.name[0]))  # other numbers for each
    mp.inject_lora(model, list(targets), 2)
    mp.save_peft(trained(model), path)
    config = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
    return path


def refused(model, folders, message, **settings):
    """merge_in_order raises, and the model is as it was: structure, numbers and sizes."""
    before = {name: id(module) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        mp.merge_in_order(model, folders, **settings)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert (model.config.vocab_size, model.vocab_size) == (N, N)


def test_chinese_alpaca_is_what_peft_makes_of_it(two):
    first, second, theirs = two
    model = llama()
    report = mp.merge_in_order(model, [first, second])
    assert model.config.vocab_size == theirs.config.vocab_size == N + 4
    ids = torch.tensor([[1, 50, 53, 3]])
    # float32: the merged weights are equal but for the order of two sums; logits up to 3
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    assert [(s.layers, s.rows_before, s.rows_after) for s in report.steps] == [
        (6, N, N + 3), (6, N + 3, N + 4),
    ]  # fmt: skip
    assert all(s.largest_change > 0 and s.order == "known by its vocabulary" for s in report.steps)
    text = str(report)
    assert "50 > 53" in text and "53 > 54" in text and len(text.splitlines()) == 3
    assert type(model.model.embed_tokens) is torch.nn.Embedding and not any(
        p.requires_grad for p in model.parameters()
    )


def test_merging_equals_the_steps_by_hand(two):
    first, second, _ = two
    model, by_hand = llama(), llama()
    mp.merge_in_order(model, [first, second])
    for folder, rows in ((first, N + 3), (second, N + 4)):
        by_hand.resize_token_embeddings(rows, mean_resizing=False)
        mp.load_peft(by_hand, folder)
        mp.remove(by_hand, merge=True)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in by_hand.state_dict().items())


def test_a_wrong_order_is_refused(two):
    first, second, _ = two
    message = r"a vocabulary of 53 rows.*has 54 rows.*the order is \[.*llama.*alpaca"
    refused(llama(), [second, first], message)


def test_the_same_lora_twice_is_refused(two, tmp_path):
    first, second, _ = two
    refused(llama(), [first, second, second], "holds the same LoRA as .*alpaca")
    one = lora(tmp_path / "one")
    again = llama()
    mp.load_peft(again, one)
    mp.save_peft(again, tmp_path / "copy")
    refused(llama(), [one, tmp_path / "copy"], "holds the same LoRA as .*one")


def test_an_adapter_that_changes_nothing_is_refused(two, tmp_path):
    model = llama()
    mp.inject_lora(model, ["q_proj"], 2)
    mp.save_peft(model, tmp_path / "zero")
    refused(llama(), [two[0], tmp_path / "zero"], "zero changes nothing")
    model = llama()
    mp.train_modules(model, ["norm"])
    mp.save_peft(model, tmp_path / "same")
    refused(llama(), [two[0], tmp_path / "same"], "same changes no number")


def test_names_of_other_bases_are_refused(tmp_path):
    one = lora(tmp_path / "one", base_model_name_or_path="llama-7b")
    two = lora(tmp_path / "two", base_model_name_or_path="bloom-7b")
    none = lora(tmp_path / "none", ["k_proj"])
    refused(llama(), [one, none, two], "one was trained over 'llama-7b' and .*'bloom-7b'")
    model = llama()
    report = mp.merge_in_order(model, [one, none, two], same_base=False)
    assert [step.order for step in report.steps] == ["any order gives the same sum"] * 3


def test_an_order_that_cannot_be_known_is_said(tmp_path):
    model = llama()
    mp.train_modules(model, ["lm_head"])
    mp.save_peft(trained(model), tmp_path / "head")
    model = llama()
    report = mp.merge_in_order(model, [lora(tmp_path / "one"), tmp_path / "head"])
    assert all(step.order.startswith("not known") for step in report.steps)
    assert all((s.rows_before, s.rows_after) == (N, N) for s in report.steps)


def test_rows_that_the_file_lacks_are_refused(tmp_path):
    chinese(tmp_path / "table", llama(), N + 3, 1, modules_to_save=["embed_tokens"])
    refused(llama(), [tmp_path / "table"], r"lacks the new rows of \['lm_head'\].*resize_token_emb")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_rows_of_extend_vocabulary_are_merged_in_order(tied, four_bit, tmp_path):
    """The second adapter is trained on what the first made."""
    model = llama(tied, four_bit)
    for number, rows in enumerate((3, 1)):
        mp.inject_lora(model, ["q_proj"], 2)
        mp.extend_vocabulary(model, rows)
        mp.save_peft(trained(model), tmp_path / str(number))
        mp.remove(model, merge=True)
    expected = logits(model, IDS)
    again = llama(tied, four_bit)
    report = mp.merge_in_order(again, [tmp_path / "0", tmp_path / "1"])
    assert torch.equal(logits(again, IDS), expected)
    assert [(s.rows_before, s.rows_after) for s in report.steps] == [(50, 53), (53, 54)]
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    if not four_bit:
        refused(llama(tied), [tmp_path / "1", tmp_path / "0"], "new rows behind 53.*has 50 rows")


def test_an_error_half_way_leaves_the_model_as_it_was(two, tmp_path):
    foreign = torch.nn.Sequential(torch.nn.Linear(4, 4))
    mp.inject_lora(foreign, ["0"], 2)
    mp.save_peft(trained(foreign), tmp_path / "foreign")
    refused(llama(), [*two[:2], tmp_path / "foreign"], "unexpected")
    other = lora(tmp_path / "wide")
    config = json.loads((other / CONFIG_NAME).read_text())
    (other / CONFIG_NAME).write_text(json.dumps({**config, "r": 3}))  # seen when it is loaded
    refused(llama(), [*two[:2], other], "")


def test_what_else_is_refused(two, tmp_path):
    refused(llama(), [], "expected a list of folders")
    refused(llama(), str(two[0]), "expected a list of folders")
    refused(llama(), [two[0], tmp_path / "missing"], "no such folder")
    model = llama()
    mp.inject_lora(model, ["q_proj"], 2)
    with pytest.raises(ValueError, match="has an adapter already"):
        mp.merge_in_order(model, [two[0]])
    with pytest.raises(ValueError, match=r"vocabulary of 53 rows.*54"):
        mp.merge_in_order(resized(rows=N + 4), [two[0]])


def test_a_model_without_a_vocabulary(tmp_path):
    def plain():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()

    for number in range(2):
        model = plain()
        torch.manual_seed(number)
        mp.inject_lora(model, ["0"], 2)
        mp.save_peft(trained(model), tmp_path / str(number))
    model, by_hand = plain(), plain()
    report = mp.merge_in_order(model, [tmp_path / "0", tmp_path / "1"])
    for number in range(2):
        mp.load_peft(by_hand, tmp_path / str(number))
        mp.remove(by_hand, merge=True)
    assert torch.equal(model[0].weight, by_hand[0].weight)
    assert report.steps[0].rows_before is None and "-" in str(report)
