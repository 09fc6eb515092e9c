"""Trainer goes on from a checkpoint, and loads its best model, by what save_pretrained writes."""

import copy
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minipeft as mp
from benchmarks.resume import METHODS, base, farthest, losses, tensors_of, trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FILE = "model.safetensors"


QUICK = ("LoRA", "prefix with MLP")


@pytest.mark.filterwarnings("ignore")  # Trainer's own, about pinned memory and tokens
@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_resumed_training_and_the_best_model_are_equal_in_every_bit(method, tmp_path, caplog):
    runs = [trainer(METHODS[method](), tmp_path / name, best=True) for name in ("whole", "again")]
    first = tmp_path / "whole" / "checkpoint-3"
    with caplog.at_level(logging.WARNING):
        runs[0].train()  # six steps, saved after the third and the sixth
        runs[1].train(resume_from_checkpoint=str(first))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    ends = [load_file(tmp_path / n / "checkpoint-6" / FILE) for n in ("whole", "again")]
    assert farthest(*ends) == 0
    assert farthest(*(tensors_of(run.optimizer.state_dict()) for run in runs)) == 0
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == 6
    best = load_file(first / FILE)  # as the test's metric says
    assert farthest(ends[0], best) > 0
    for run in runs:
        assert run.state.best_model_checkpoint == str(first)
        state = run.model.state_dict()
        assert farthest(best, {name: state[name] for name in best}) == 0


def lora(**options):
    model = base()
    mp.inject_lora(model, "all-linear", 2, **options)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


def test_the_file_holds_everything_that_trains_under_the_models_own_names(tmp_path):
    model = lora(init=mp.starts.pissa())
    mp.inject_lora(model, ["q_proj"], 3, name="second")
    mp.attach_prefix(model, 4, hidden=8, name="third")
    mp.train_modules(model, ["norm"], name="second")
    for parameter in mp.adapter_parameters(model, name="default"):
        parameter.requires_grad_(False)  # frozen ones too
    model.model.embed_tokens.weight.requires_grad_(True)  # and what somebody lets train beside
    model.save_pretrained(tmp_path)
    found, state = load_file(tmp_path / FILE), model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in found.items())
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    own |= {n for n in state if n.endswith(("lora_a", "lora_b", "lora_a0", "lora_b0"))}
    assert found.keys() == own
    assert any("third.inner" in name for name in own) and any("copy" in name for name in own)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_pefts_readers_and_from_pretrained_take_the_folder_for_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    base().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    mp.inject_lora(model, "all-linear", 2)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / FILE).is_file()
    ids = torch.randint(3, 100, (2, 7))
    with torch.no_grad():
        expected = model.eval()(ids).logits
        plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        assert not torch.allclose(plain.eval()(ids).logits, expected, atol=1e-3)
        for found in (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
            peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"),
        ):
            # float32: the order of the sums of a product of 64 numbers
            torch.testing.assert_close(found.eval()(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [FILE, "config.json", "model.safetensors.index.json"])
def test_a_folder_that_holds_a_model_keeps_it(name, tmp_path):
    if name == FILE:
        save_file({"weight": torch.ones(3)}, tmp_path / name, metadata={"format": "pt"})
    else:
        (tmp_path / name).write_text("{}")
    before = (tmp_path / name).read_bytes()
    model = lora()
    with pytest.warns(UserWarning, match=rf"holds {name}, which is a model's; .* of their own"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / name).read_bytes() == before
    others = {"adapter_config.json", "adapter_model.safetensors", name}
    assert {path.name for path in tmp_path.iterdir()} == others
    fresh = base()
    assert mp.load_peft(fresh, tmp_path)


def test_our_own_file_is_replaced_and_goes_where_a_model_came_beside_it(tmp_path):
    model = lora()
    for value in (1.0, 2.0):
        for parameter in mp.adapter_parameters(model):
            nn.init.constant_(parameter, value)
        model.save_pretrained(tmp_path)
        assert all((t == value).all() for t in load_file(tmp_path / FILE).values())
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="holds config.json"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()  # it would be of an older save


def test_load_state_dict_is_torchs_but_for_the_adapters_tensors(tmp_path):
    model = lora()
    own = {name: torch.full_like(t, 3.0) for name, t in mp.adapter_state_dict(model).items()}
    found = model.load_state_dict(own, False)
    assert found.missing_keys == [] and found.unexpected_keys == []
    assert all((t == 3.0).all() for t in mp.adapter_state_dict(model).values())

    plain = set(model.state_dict()) - set(own)
    fewer = dict(list(own.items())[1:])
    assert set(model.load_state_dict(fewer, strict=False).missing_keys) == set(
        model.state_dict()
    ) - set(fewer)
    more = {**own, "odd": torch.ones(1)}
    result = model.load_state_dict(more, strict=False)
    assert result.unexpected_keys == ["odd"] and set(result.missing_keys) == plain
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(own)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(own, strict=True, assign=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({n: t[..., :1] for n, t in own.items()}, False)
    assert not model.load_state_dict(model.state_dict()).missing_keys


def test_merged_adapters_are_saved_and_refused_on_loading(tmp_path):
    model = lora().eval()
    model.save_pretrained(tmp_path / "a")
    mp.merge(model)
    model.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / name / FILE) for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(RuntimeError, match=r"is merged; call minipeft.unmerge"):
        model.load_state_dict(a, False)
    mp.unmerge(model)
    assert model.load_state_dict(a, False).missing_keys == []


def test_copies_load_into_themselves_and_removing_gives_torchs_method_back():
    model = lora()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ones = {name: torch.ones_like(t) for name, t in mp.adapter_state_dict(model).items()}
        assert again.load_state_dict(ones, False).missing_keys == []
        assert all((t == 1).all() for t in mp.adapter_state_dict(again).values())
        assert not any((t == 1).all() for t in mp.adapter_state_dict(model).values())
    mp.remove(model)
    assert "load_state_dict" not in vars(model) and "save_pretrained" not in vars(model)
    assert model.load_state_dict({}, False).missing_keys


def test_torchs_distributed_checkpoint_loads_through_it():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = lora()
    ones = {name: torch.ones_like(t) for name, t in mp.adapter_state_dict(model).items()}
    set_model_state_dict(model, ones, options=StateDictOptions(strict=False))
    assert all((t == 1).all() for t in mp.adapter_state_dict(model).values())
