"""Several prefixes, rows, locations, windows and heads on small random models, and refusals."""

import copy
import socket
import sys

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
from benchmarks.models import enable_checkpointing
from tests.prefix_behaviours import GREEDY, Case, P, difference, random_lora
from tests.prefix_families import FAMILIES, build

SIZES = FAMILIES["LLaMA"].sizes
TOLERANCE = 1e-5  # float32, logits around 1, summed in another order


def open_gates(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gates" in name:
                parameter.fill_(1.0)


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "ELECTRA", "DistilBERT"])
def test_an_encoder_keeps_its_full_length(family):
    case = Case(family)
    prefix = case.attach(tokens=False)
    assert prefix.position == "none"
    full = torch.randint(3, 97, (1, 64))
    case.model(full)
    shifted = Case(family)
    shifted.attach(tokens=False, position="shift")
    shifted.model(full[:, P:])
    with pytest.raises(ValueError, match="beyond the model's table"):
        shifted.model(full[:, 1:])


def test_beams_and_several_answers_follow_their_row():
    case = Case("LLaMA")
    case.attach()
    mp.attach_prefix(case.model, 3, name="other", init_std=1.0)
    alone = {}
    for name in ("default", "other"):
        mp.use_adapters(case.model, name)
        alone[name] = case.model.generate(case.text, num_beams=3, **GREEDY)
    mp.use_adapters(case.model, rows=["default", "other"])
    together = case.model.generate(case.text, num_beams=3, **GREEDY)
    assert torch.equal(together[0], alone["default"][0])
    assert torch.equal(together[1], alone["other"][1])
    with pytest.raises(ValueError, match="batch of 3 rows"):
        case.model(case.text[:1].expand(3, -1))


def test_rows_use_lora_and_prefixes_of_their_own_at_once():
    case = Case("LLaMA")
    case.text = case.text[:1].expand(3, -1)
    mp.inject_lora(case.model, "all-linear", rank=2)
    mp.attach_prefix(case.model, P, name="deep", init_std=1.0)
    for name, parameter in case.model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    alone = {}
    for names in (["default"], ["deep"], ["default", "deep"]):
        mp.use_adapters(case.model, names)
        alone[tuple(names)] = case.logits()[0]
    mp.use_adapters(case.model, rows=["deep", "default", ["default", "deep"]])
    rows = case.logits()
    for row, names in zip(rows, [("deep",), ("default",), ("default", "deep")], strict=True):
        assert difference(row, alone[names]) <= TOLERANCE
    mp.use_adapters(case.model, ["deep"])
    assert difference(case.logits()[0], alone["deep",]) == 0


def test_names_that_do_not_exist_change_nothing():
    case = Case("LLaMA")
    case.attach()
    mp.attach_prefix(case.model, 3, name="other", init_std=1.0)
    mp.use_adapters(case.model, rows=["default", "other"])
    before = case.logits()
    for wrong in ({"names": "nobody"}, {"rows": [None, "nobody"]}, {"rows": ["default", "nobody"]}):
        with pytest.raises(ValueError, match="no adapter"):
            mp.use_adapters(case.model, **wrong)
        assert torch.equal(case.logits(), before)
    mp.use_adapters(case.model, rows=["other", None])
    assert not torch.equal(case.logits(), before)


def test_load_tokens_runs_without_any_prefix_and_puts_back_what_was_on():
    case, alone = Case("LLaMA"), Case("LLaMA")
    first = alone.attach(tokens=False)
    first.load_tokens(case.prompt)
    case.attach()
    prefix = mp.attach_prefix(case.model, case.prompt.shape[1], name="other")
    mp.use_adapters(case.model, rows=["default", "other"])
    prefix.load_tokens(case.prompt, name="other")
    assert torch.equal(prefix.encoders["other"].flat(), first.encoder.flat())
    rows = case.logits()
    for row, name in enumerate(["default", "other"]):
        mp.use_adapters(case.model, name)
        assert difference(rows[row], case.logits()[row]) <= TOLERANCE


def test_an_encoder_of_ones_own_is_attached_itself():
    case = Case("LLaMA")
    with pytest.raises(ValueError, match="the encoder has layers"):
        mp.attach_prefix(case.model, mp.PrefixEncoder([(2, 8, 8)] * 7, 4))
    assert not list(mp.adapter_parameters(case.model))
    prefix = case.attach()
    encoder = mp.PrefixEncoder(prefix.kv_shapes, 4, init_std=1.0)
    assert mp.attach_prefix(case.model, encoder, name="own") is prefix
    assert prefix.encoders["own"] is encoder
    mp.use_adapters(case.model, "own")
    assert list(mp.adapter_parameters(case.model, name="own")) == list(encoder.parameters())
    on = case.logits()
    with mp.disable_adapters(case.model):
        # an effect, a thousand times float32's round-off
        assert difference(on, case.logits()) > 1e-3
    for own, more, message in (
        (mp.PrefixEncoder([(2, 8, 8)] * 2, 4), {"name": "other"}, "the encoder has layers"),
        (mp.PrefixEncoder(prefix.kv_shapes, 4), {"name": "own"}, "already"),
        (encoder, {"name": "other"}, "has this encoder already"),
        (mp.PrefixEncoder(prefix.kv_shapes, 4), {"name": "b", "hidden": 8}, "leave out .'hidden'"),
    ):
        with pytest.raises(ValueError, match=message):
            mp.attach_prefix(case.model, own, **more)
    assert list(prefix.encoders) == ["default", "own"]
    assert torch.equal(case.logits(), on)


def test_taking_one_of_two_off():
    case = Case("LLaMA")
    bare = case.logits()
    prefix = case.attach()
    alone = case.logits()
    mp.attach_prefix(case.model, 3, name="other", init_std=1.0)
    assert not torch.equal(case.logits(), alone)
    prefix.remove(name="other")
    assert torch.equal(case.logits(), alone)
    prefix.remove(name="default")
    assert torch.equal(case.logits(), bare) and not hasattr(case.model, "minipeft_prefix")


def test_remove_takes_prefixes_off_by_name_and_with_all_else():
    case = Case("LLaMA")
    before, names = case.logits(), set(case.model.state_dict())
    mp.inject_lora(case.model, "all-linear", rank=2)
    case.attach()
    mp.attach_prefix(case.model, 3, name="deep", init_std=1.0)
    assert mp.remove(case.model, name="deep") == ["minipeft_prefix.encoders.deep"]
    with pytest.raises(ValueError, match="no adapter 'deep'"):
        mp.remove(case.model, name="deep")
    assert len(mp.remove(case.model)) == 1 + 21
    assert torch.equal(case.logits(), before) and set(case.model.state_dict()) == names
    case.attach()
    mp.remove(case.model, name="default")
    assert torch.equal(case.logits(), before) and set(case.model.state_dict()) == names


@pytest.mark.parametrize("call", [1, 2, 3])
def test_remove_of_lora_and_prefixes_is_one_step(call, monkeypatch):
    """Listeners hear of the LoRA layers first, then of each prefix: an error puts all back."""
    case = Case("LLaMA")
    bare = case.logits()
    mp.inject_lora(case.model, "all-linear", rank=2)
    for name, parameter in case.model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    case.attach()
    mp.attach_prefix(case.model, 3, name="deep", init_std=1.0)
    before, names, heard = case.logits(), set(case.model.state_dict()), []

    def fail(model):
        heard.append(model)
        if len(heard) == call:
            raise MemoryError("no room")

    monkeypatch.setattr(sys.modules["minipeft.inject"], "after_swap", [fail])
    with pytest.raises(MemoryError):
        mp.remove(case.model)
    assert torch.equal(case.logits(), before) and set(case.model.state_dict()) == names
    assert len(mp.remove(case.model)) == 21 + 2
    assert torch.equal(case.logits(), bare)


@pytest.mark.parametrize("family", ["T5", "BART"])
@pytest.mark.parametrize("locations", [["encoder"], ["decoder"], "cross", ["encoder", "cross"]])
def test_locations_of_an_encoder_decoder_are_chosen(family, locations):
    case, whole = Case(family), Case(family)
    bare = case.logits()
    prefix = case.attach(locations=locations)
    locations = [locations] if isinstance(locations, str) else locations
    assert set(prefix.locations) == set(locations) and len(prefix.kv_shapes) == 3 * len(locations)
    # the same
    assert difference(case.logits(), bare) > 1e-3
    everywhere = whole.attach()
    with torch.no_grad():
        for layer, location in enumerate(everywhere.locations):
            if location not in locations:  # values of 0 under keys that nobody looks at
                table = everywhere.encoder.tables[layer]
                assert difference(table, torch.zeros_like(table)) > 0
    # an effect, a hundred times float32's round-off
    assert difference(case.logits(), whole.logits()) > 1e-4
    encoded = case.model.get_encoder()(case.text).last_hidden_state
    with mp.disable_adapters(case.model):
        plain = case.model.get_encoder()(case.text).last_hidden_state
    # the same
    assert (difference(encoded, plain) > 1e-4) == ("encoder" in locations)


def test_masks_of_four_dimensions_get_the_prefixs_columns():
    for family in ("LLaMA", "Falcon, 7B kind"):
        case = Case(family)
        case.attach()
        expected = case.logits()
        causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
        with torch.no_grad():
            found = case.model(case.text, attention_mask=causal).logits
        assert difference(found, expected) <= TOLERANCE
    case = Case("Mistral, window")
    case.attach(window="like_token")
    with pytest.raises(ValueError, match="needs a 2-D mask"):
        case.model(case.text, attention_mask=causal)


def test_packed_sequences_each_see_the_prefix():
    case = Case("LLaMA")
    case.attach()
    numbers = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = case.logits(text=case.text[:1], position_ids=numbers, use_cache=False)
    first, second = (case.logits(text=case.text[:1, part]) for part in (slice(4), slice(4, None)))
    assert difference(packed, torch.cat([first, second], 1)) <= TOLERANCE
    through_cache = Case("CodeGen")
    through_cache.attach()
    with pytest.raises(ValueError, match="texts are packed"):
        through_cache.logits(text=case.text[:1], position_ids=numbers, use_cache=False)


def test_checkpointing_on_a_filled_cache_is_refused():
    case = Case("BLOOM")
    case.attach()
    cache = case.model(case.text[:, :4], use_cache=True).past_key_values
    case.model.train()
    enable_checkpointing(case.model, reentrant=False)
    with pytest.raises(ValueError, match="cache of 4 tokens"):
        case.model(case.text[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("family", ["LLaMA", "BLOOM"])
def test_two_forwards_before_two_backwards_with_checkpointing(family):
    case = Case(family)
    case.model.train()
    case.model.config.use_cache = False
    prefix = case.attach(tokens=False)
    mp.attach_prefix(case.model, 3, name="other")

    def gradients(second):
        case.model.zero_grad()
        losses = []
        for rows in (["default", "other"], second):
            mp.use_adapters(case.model, rows=rows)
            losses.append(case.model(case.text, labels=case.text).loss)
        for loss in losses:
            loss.backward()
        return {n: p.grad.clone() for n, p in prefix.named_parameters()}

    plain = gradients(["other", "default"])
    enable_checkpointing(case.model, reentrant=False)
    again = gradients(["other", "default"])  # the same prefixes in other rows: the masks say which
    for name, gradient in plain.items():
        assert difference(again[name], gradient) <= TOLERANCE * float(gradient.abs().max())
    with pytest.raises(ValueError, match="a prefix was switched after this forward"):
        gradients(["other", None])


def test_checkpointed_layers_that_would_drop_the_prefix_are_refused(monkeypatch):
    from minipeft.integrations.transformers import hooks

    # as in a transformers whose layers cannot say that they only read the cache
    monkeypatch.setattr(hooks, "READS_ONLY", "_no_layer_has_this")
    case = Case("BLOOM")
    case.attach(tokens=False)
    case.model.train()
    case.model(case.text)
    enable_checkpointing(case.model, reentrant=False)
    with pytest.raises(ValueError, match="checkpointing would take the prefix from its layers"):
        case.model(case.text)


def test_methods_without_a_name_are_of_the_default_one():
    case = Case("LLaMA")
    prefix = mp.attach_prefix(case.model, P, name="poet")
    for call in (prefix.bake, lambda: prefix.load_tokens(case.prompt), lambda: prefix.load_kv([])):
        with pytest.raises(ValueError, match=r"no prefix 'default'; the model has \['poet'\]"):
            call()
    case.attach()
    before = prefix.encoders["default"].flat().clone()
    prefix.load_tokens(case.prompt, name="poet")
    assert torch.equal(prefix.encoders["default"].flat(), before)
    assert torch.equal(prefix.encoders["poet"].flat(), before)


def test_a_large_mlp_is_warned_of_with_its_size():
    with pytest.warns(UserWarning, match=r"the MLP has [\d,]+ parameters, \d+% of the base's"):
        mp.attach_prefix(build("LLaMA"), P, hidden=64)


@pytest.mark.parametrize(
    ("family", "keywords", "message"),
    [
        ("BLOOM", {"position": "none"}, "ALiBi"),
        ("MPT", {"position": "none"}, "ALiBi"),
        ("T5", {"position": "shift"}, "position='none'"),
        ("BERT", {"window": "like_token"}, "only a decoder"),
        ("LLaMA", {"window": "sometimes"}, "window='sometimes'"),
        ("LLaMA", {"position": "left"}, "position='left'"),
        ("LLaMA", {"locations": ["cross"]}, "locations="),
        ("GPT-2", {"prefix_length": 64}, "position table of"),
        ("CodeGen", {"prefix_length": 64}, "position table of"),
        ("LLaMA", {"frozen": P}, "frozen=5"),
        ("LLaMA", {"name": "a b"}, "cannot name an adapter"),
    ],
)
def test_refusals_leave_the_model_as_it_was(family, keywords, message):
    case = Case(family)
    before, names = case.logits(), set(case.model.state_dict())
    configs = {id(m.config) for m in case.model.modules() if hasattr(m, "config")}
    with pytest.raises(ValueError, match=message):
        mp.attach_prefix(case.model, **{"prefix_length": P, **keywords})
    assert set(case.model.state_dict()) == names and torch.equal(case.logits(), before)
    assert {id(m.config) for m in case.model.modules() if hasattr(m, "config")} == configs
    assert all(p.requires_grad for p in case.model.parameters())
    assert not any(m._forward_pre_hooks for m in case.model.modules())


def test_tokens_to_start_from_must_fit():
    case = Case("LLaMA")
    prefix = case.attach()
    with pytest.raises(ValueError, match="the prefix takes"):
        prefix.load_tokens(case.text)
    other = Case("T5").attach(tokens=False)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        other.load_tokens(case.prompt)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("BertForSequenceClassification", {"num_labels": 3}),
        ("BertForTokenClassification", {"num_labels": 3}),
        ("BertForQuestionAnswering", {}),
        ("LlamaForSequenceClassification", {"num_labels": 3}),
    ],
)
def test_new_heads_train_with_the_prefix_and_go_off_with_it(model, sizes, tmp_path):
    import transformers

    family = FAMILIES["BERT" if model.startswith("Bert") else "LLaMA"]
    config = getattr(transformers, family.config)(**family.sizes, **sizes)

    def make():
        torch.manual_seed(0)
        return getattr(transformers, model)(config).eval()

    built, text = make(), torch.randint(3, 97, (4, 9))

    def out(m):
        with torch.no_grad():
            found = m(text)
        return found.start_logits if "start_logits" in found else found.logits

    before = out(built)
    mp.attach_prefix(built, P, init_std=0.5)
    head = {n for n, p in built.named_parameters() if p.requires_grad and "prefix" not in n}
    assert {n.split(".")[1] for n in head} == {"copy"} and len(head) >= 1
    optimizer = torch.optim.AdamW(mp.adapter_parameters(built), lr=1e-1)
    answers = {"start_positions": torch.ones(4).long(), "end_positions": torch.ones(4).long() * 2}
    if "Question" not in model:
        answers = {"labels": torch.zeros(4 if "Sequence" in model else (4, 9)).long()}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = built(text, **answers).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = out(built)
    with mp.disable_adapters(built):
        assert torch.equal(out(built), before)
    mp.io.prefixes.save_prefix(built, tmp_path)
    again = make()
    mp.io.prefixes.load_prefix(again, tmp_path)
    assert torch.equal(out(again), trained)
    mp.remove(built)
    assert torch.equal(out(built), before) and set(built.state_dict()) == set(make().state_dict())
    frozen = make()
    mp.attach_prefix(frozen, P, train_head=False)
    assert all("prefix" in n for n, p in frozen.named_parameters() if p.requires_grad)


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_data_parallel_training_has_the_gradients_of_the_whole_batch(plain_python):
    printed = plain_python(
        """
import os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp_
from torch.nn.parallel import DistributedDataParallel
import minipeft as mp
from tests.gloo import leave
from tests.prefix_behaviours import Case

def make(family):
    case = Case(family)
    torch.manual_seed(3)
    mp.attach_prefix(case.model, 5, train_head=False)
    case.model.config.use_cache = False
    return case

def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for family in ("LLaMA", "BLOOM"):
        case = make(family)
        model = DistributedDataParallel(case.model)
        row = case.text[rank : rank + 1]
        model(input_ids=row, labels=row).loss.backward()
        if rank == 0:
            whole = make(family)
            whole.model(whole.text, labels=whole.text).loss.backward()
            worst = max(
                float((a.grad - b.grad).abs().max() / b.grad.abs().max())
                for a, b in zip(mp.adapter_parameters(case.model),
                                mp.adapter_parameters(whole.model))
            )
            print(family, worst, sep="; ", flush=True)
    leave()

if __name__ == "__main__":
    mp_.spawn(work, (os.environ["FREE_PORT"],), nprocs=2)
""",
        FREE_PORT=_free_port(),
    )
    rows = dict(line.split("; ") for line in printed.splitlines() if "; " in line)
    assert set(rows) == {"LLaMA", "BLOOM"}
    assert all(float(value) <= TOLERANCE for value in rows.values()), rows


class Texts(torch.utils.data.Dataset):
    """Sixteen texts; the label of a token is itself, or whether its id is odd."""

    def __init__(self, *, odd: bool) -> None:
        self.odd = odd

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 97, (9,), generator=torch.Generator().manual_seed(index))
        labels = ids % 2 if self.odd else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.filterwarnings("ignore")  # Trainer's own, about pinned memory and tokens
@pytest.mark.parametrize(
    ("family", "settings"),
    [("LLaMA", {}), ("BERT", {}), ("T5", {}), ("BLOOM", {"hidden": 4})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_trainer_checkpoints_come_back(family, settings, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, fresh = build(family), build(family)
    mp.attach_prefix(model, P, **settings)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=4, save_steps=2, report_to=[],
        learning_rate=1e-2, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts(odd=family == "BERT"))
    trainer.train()
    saved = tmp_path / "checkpoint-4"
    if (saved / "prefix_config.json").is_file():
        mp.io.prefixes.load_prefix(fresh, saved)
    else:
        mp.load_peft(fresh, saved)
    text = Texts(odd=False)[0]["input_ids"][None]
    more = {"decoder_input_ids": text} if family == "T5" else {}
    with torch.no_grad():
        assert torch.equal(fresh(text, **more).logits, model.eval()(text, **more).logits)


@pytest.mark.parametrize(
    ("family", "reentrant"),
    # re-entrant checkpointing hands T5's layers a mask that does not say whose it is
    [("LLaMA", False), ("LLaMA", True), ("BLOOM", False), ("BLOOM", True), ("T5", False)],
)
def test_switching_before_a_checkpointed_backward_is_refused(family, reentrant):
    case = Case(family)
    case.model.train()
    case.model.config.use_cache = False
    case.attach(tokens=False)
    mp.attach_prefix(case.model, P, name="other")
    enable_checkpointing(case.model, reentrant=reentrant)
    mp.use_adapters(case.model, "default")
    loss = case.model(**case.inputs()).logits.square().mean()
    mp.use_adapters(case.model, "other")
    with pytest.raises(ValueError, match="a prefix was switched after this forward"):
        loss.backward()
    loss = case.model(**case.inputs()).logits.square().mean()
    with mp.disable_adapters(case.model), pytest.raises(ValueError, match="was switched"):
        loss.backward()


def test_gated_prefixes_are_no_tokens_of_a_window_and_stay_causal():
    case = Case("Mistral, window")
    case.attach(tokens=False, window="like_token")
    mp.attach_prefix(case.model, 3, gated=True, name="gated", init_std=1.0)
    open_gates(case.model)
    text = torch.randint(3, 97, (1, 20))
    with torch.no_grad():
        whole, start = case.model(text).logits[:, :4], case.model(text[:, :4]).logits
    assert difference(whole, start) <= TOLERANCE


def test_packed_texts_and_a_window_that_leaves_the_prefix_behind():
    case = Case("Mistral, window")
    case.attach(tokens=False, window="like_token")
    numbers = torch.cat([torch.arange(12), torch.arange(8)])[None]
    text = torch.randint(3, 97, (1, 20))
    with pytest.raises(ValueError, match="texts are packed"):
        case.logits(text=text, position_ids=numbers, use_cache=False)


def test_remove_refuses_before_it_takes_anything_off():
    case = Case("LLaMA")
    random_lora(case.model)
    case.attach()
    mp.merge(case.model)
    before = case.logits()
    with pytest.raises(ValueError, match="is merged"):
        mp.remove(case.model, name="default")
    assert torch.equal(case.logits(), before) and hasattr(case.model, "minipeft_prefix")


def test_a_head_under_lora_is_not_left_behind():
    import transformers

    config = transformers.LlamaConfig(**SIZES, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    text = torch.randint(3, 97, (2, 9))
    before = model(text).logits.detach()
    prefix = mp.attach_prefix(model, 5, name="first")
    mp.inject_lora(model, "score", 2, name="lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "copy" in name:
                parameter.add_(1.0)
    with pytest.raises(ValueError, match="another adapter over it"):
        prefix.remove()
    mp.remove(model, name="first")
    assert torch.equal(model(text).logits, before)


def test_rows_chosen_in_inference_mode_can_be_chosen_again():
    case = Case("LLaMA")
    case.attach()
    mp.attach_prefix(case.model, 3, name="other")
    with torch.inference_mode():
        mp.use_adapters(case.model, rows=["default", "other"])
        mp.use_adapters(case.model, rows=["other", None])
    mp.use_adapters(case.model, rows=["other", "default"])
    rows = case.logits()
    for row, name in enumerate(["other", "default"]):
        mp.use_adapters(case.model, name)
        assert difference(rows[row], case.logits()[row]) <= TOLERANCE


def test_heads_go_on_and_off_with_their_prefix_and_a_second_prefix_is_told():
    import transformers

    config = transformers.BertConfig(**FAMILIES["BERT"].sizes, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    text = torch.randint(3, 97, (2, 9))
    before = model(text).logits.detach()
    mp.attach_prefix(model, 5, name="first")
    with torch.no_grad():
        model.classifier.copy.weight.add_(1.0)
    trained = model(text).logits.detach()
    with mp.disable_adapters(model):
        assert torch.equal(model(text).logits, before)
    # an effect, a thousand times float32's round-off
    assert torch.equal(model(text).logits, trained) and difference(trained, before) > 1e-3
    with pytest.warns(UserWarning, match="'second' has none of its own"):
        mp.attach_prefix(model, 5, name="second")


def test_rows_of_a_prefix_with_a_head_use_its_head():
    import transformers

    config = transformers.BertConfig(**FAMILIES["BERT"].sizes, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    text = torch.randint(3, 97, (3, 9))
    before = model(text).logits.detach()
    mp.attach_prefix(model, 5, name="first")
    with torch.no_grad():
        model.classifier.copy.weight.add_(1.0)
    trained = model(text).logits.detach()
    mp.use_adapters(model, rows=["first", None, "first"])
    mixed = model(text).logits
    assert difference(mixed[[0, 2]], trained[[0, 2]]) <= TOLERANCE
    assert difference(mixed[1], before[1]) <= TOLERANCE
    mp.use_adapters(model, "first")
    assert torch.equal(model(text).logits, trained)


def test_a_prefix_that_is_off_while_rows_use_it_is_named():
    case = Case("LLaMA")
    prefix = case.attach()
    mp.attach_prefix(case.model, 3, name="other")
    mp.use_adapters(case.model, rows=["default", "other"])
    prefix.encoders["other"].enabled = False
    with pytest.raises(ValueError, match="prefix 'other' is off, and rows use it"):
        case.logits()


def test_masks_for_one_row_for_all_slots_and_from_the_model_that_was_copied():
    case = Case("LLaMA")
    mp.attach_prefix(case.model, 3, gated=True)
    case.logits(attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
    bloom = Case("BLOOM")
    mask = torch.ones_like(bloom.text)
    mask[0, :3] = 0
    settings = GREEDY | {"attention_mask": mask, "max_new_tokens": 8}
    plain = bloom.model.generate(bloom.text, cache_implementation="static", **settings)
    bloom.attach(tokens=False)
    with mp.disable_adapters(bloom.model):
        off = bloom.model.generate(bloom.text, cache_implementation="static", **settings)
    assert torch.equal(off, plain)
    dynamic = bloom.model.generate(bloom.text, **settings)
    static = bloom.model.generate(bloom.text, cache_implementation="static", **settings)
    assert torch.equal(static, dynamic)
    first = Case("LLaMA")
    first.attach()
    twin = copy.deepcopy(first.model)
    mp.attach_prefix(first.model, 3, name="other")
    expected = twin.generate(first.text, **GREEDY)
    again = copy.deepcopy(first.model)
    mp.attach_prefix(first.model, 4, name="third")
    again.minipeft_prefix.remove(name="other")
    static = again.generate(first.text, cache_implementation="static", **GREEDY)
    assert torch.equal(static, expected)


def test_a_gated_prefix_moves_no_token_also_beside_another():
    case = Case("GPT-2")
    prefix = case.attach(tokens=False)
    before = case.logits()
    mp.attach_prefix(case.model, 3, name="gated", gated=True)
    assert difference(case.logits(), before) <= TOLERANCE
    assert prefix.position == "shift"
