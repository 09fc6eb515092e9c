"""Files with rows of new tokens: ours and PEFT's, onto models of the old and of the new size."""

import json

import pytest
import torch

import minipeft as mp
from minipeft.io.files import read_tensors
from minipeft.io.peft import CONFIG_NAME, WEIGHTS_NAME
from minipeft.layers.trained import TrainedTokens
from minipeft.layers.vocabulary import LongerHead, LongerTable
from tests.model.test_vocabulary import (
    FOUR_BIT,
    NEW,
    ROUNDING,
    TIED,
    K,
    N,
    Plain,
    llama,
    logits,
    trained,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
NEW_IDS = [N, N + 1, N + 2]


def resized(tied=False, rows=N + K):
    """A model whose tables transformers made longer, with other random rows at each call."""
    model = llama(tied)
    torch.manual_seed(int(torch.randint(99, ())))
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def saved(path, tied=False, four_bit=False, **settings):
    """A model with LoRA and new rows, trained and saved."""
    model = llama(tied, four_bit)
    mp.inject_lora(model, ["q_proj"], 2)
    mp.extend_vocabulary(model, K, **settings)
    mp.save_peft(trained(model), path)
    return model


def refused(model, path, message):
    """load_peft raises and leaves the model as it was."""
    before = {name: id(module) for name, module in model.named_modules()}
    size = model.config.vocab_size
    with pytest.raises(ValueError, match=message):
        mp.load_peft(model, path)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.config.vocab_size == size


@TIED
@FOUR_BIT
def test_new_rows_come_back_in_every_bit(tied, four_bit, tmp_path):
    expected = logits(saved(tmp_path, tied, four_bit), NEW)
    rows = [v for k, v in read_tensors(tmp_path / WEIGHTS_NAME).items() if "token_adapter" in k]
    assert [v.shape for v in rows] == [(K, 64)] * (1 if tied else 2)  # no table is in the file
    ids = json.loads((tmp_path / CONFIG_NAME).read_text())["trainable_token_indices"]
    assert list(ids.values()) == [NEW_IDS] * len(rows)
    alone, extended = llama(tied, four_bit), llama(tied, four_bit)
    mp.extend_vocabulary(extended, K)
    for model in (alone, extended):
        mp.load_peft(model, tmp_path)
        assert torch.equal(logits(model, NEW), expected)
        assert model.config.vocab_size == N + K
        assert type(model.model.embed_tokens) is LongerTable
        assert model.model.embed_tokens.new_rows.requires_grad
        mp.save_peft(model, tmp_path / "again")
        assert (
            read_tensors(tmp_path / "again" / WEIGHTS_NAME).keys()
            == read_tensors(tmp_path / WEIGHTS_NAME).keys()
        )
    mp.remove(alone, merge=True)
    torch.testing.assert_close(logits(alone, NEW), expected, **ROUNDING)
    mp.remove(extended)
    assert extended.config.vocab_size == N


@TIED
def test_a_resized_model_and_peft_compute_the_same_with_the_file(tied, tmp_path):
    expected = logits(saved(tmp_path, tied), NEW)
    ours = resized(tied)
    mp.load_peft(ours, tmp_path)
    assert type(ours.model.embed_tokens) is TrainedTokens
    torch.testing.assert_close(logits(ours, NEW), expected, **ROUNDING)
    theirs = peft.PeftModel.from_pretrained(resized(tied), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, NEW), expected, **ROUNDING)


@TIED
def test_tables_that_train_whole_are_saved_whole(tied, tmp_path):
    expected = logits(saved(tmp_path, tied, whole_table=True), NEW)
    refused(
        llama(tied), tmp_path,
        r"53 rows in the file and 50 in the model.*resize_token_embeddings\(53\).*"
        r"not minipeft.extend_vocabulary, which adds rows for new tokens alone",
    )  # fmt: skip
    longer = llama(tied)
    mp.extend_vocabulary(longer, K)
    refused(longer, tmp_path, "in the file as a whole, and has new rows in the model")
    ours = resized(tied)
    mp.load_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours, NEW), expected, **ROUNDING)
    theirs = peft.PeftModel.from_pretrained(resized(tied), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, NEW), expected, **ROUNDING)


@pytest.mark.parametrize("tables", [False, True], ids=["rows alone", "rows and base tables"])
def test_pefts_rows_of_new_tokens_go_behind_an_extended_model(tables, tmp_path):
    settings = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": NEW_IDS}
    theirs = peft.get_peft_model(resized(True), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path, save_embedding_layers=tables)
    has = f"{N + K} rows" if tables else f"token ids up to {N + K - 1}, so at least {N + K} rows"
    both = r"resize_token_embeddings\(53\) first, or minipeft.extend_vocabulary\(model, 3\)"
    refused(llama(True), tmp_path, f"{has} in the file and 50 in the model.*{both}")
    ours = llama(True)
    mp.extend_vocabulary(ours, K)
    mp.load_peft(ours, tmp_path)
    assert type(ours.lm_head) is LongerHead
    torch.testing.assert_close(logits(ours, NEW), logits(theirs, NEW), **ROUNDING)


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_has_its_rows_back(tied, tmp_path):
    def plain():
        torch.manual_seed(0)
        return Plain(tied=tied)

    model = plain()
    mp.extend_vocabulary(model, K, table=["embed"], head=["out"])
    mp.save_peft(trained(model), tmp_path)
    again = plain()
    mp.load_peft(again, tmp_path)
    assert torch.equal(again(NEW), model(NEW)) and again.n_vocab == N + K
    mp.remove(again)
    assert again.n_vocab == N and torch.equal(again(NEW % N), plain()(NEW % N))


def test_files_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path)
    refused(resized(rows=N + 1), tmp_path, "a table that had 50 rows, and the model's has 51")
    model = llama()
    mp.extend_vocabulary(model, K + 1)
    refused(model, tmp_path, "extend_vocabulary made 50 to 53 in the model")
    model = llama()
    mp.extend_vocabulary(model, K, name="another")
    refused(model, tmp_path, "belong to another adapter")
    settings = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": NEW_IDS}
    theirs = peft.get_peft_model(resized(), peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "table", save_embedding_layers=False)
    model = llama()
    mp.extend_vocabulary(model, K)
    refused(model, tmp_path / "table", "none for the head")


def test_what_pefts_format_cannot_hold_is_refused(tmp_path):
    model = llama()
    mp.inject_lora(model, ["embed_tokens"], 2)
    mp.extend_vocabulary(model, K)
    with pytest.raises(ValueError, match="new rows over LoRAEmbedding"):
        mp.save_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_two_adapters_are_saved_apart(tmp_path):
    model = llama()
    mp.inject_lora(model, ["q_proj"], 2)
    mp.extend_vocabulary(model, K, name="zh")
    expected = logits(trained(model), NEW)
    mp.save_peft(model, tmp_path)
    again = llama()
    mp.load_peft(again, tmp_path)
    mp.load_peft(again, tmp_path / "zh", name="zh")
    assert torch.equal(logits(again, NEW), expected)


def test_a_row_that_does_not_train_stays_so(tmp_path):
    model = llama(True)
    mp.inject_lora(model, ["q_proj"], 2)
    mp.extend_vocabulary(model, K)
    model.model.embed_tokens.new_rows.requires_grad_(False)
    mp.save_peft(model, tmp_path)
    again = llama(True)
    mp.load_peft(again, tmp_path)
    assert not again.model.embed_tokens.new_rows.requires_grad
    again.save_pretrained(tmp_path / "trainer")  # as transformers' Trainer does
    assert (tmp_path / "trainer" / WEIGHTS_NAME).is_file()
