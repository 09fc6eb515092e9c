"""Slices of the models that have fused projections: our files keep them, and PEFT reads them."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers import LoRAFusedLinear
from minipeft.layers.fused import blocks, per_group, per_head

transformers = pytest.importorskip("transformers")

HEADS, DIM = 4, 4
SIZE = HEADS * DIM
IDS = torch.tensor([[1, 5, 2, 9]])
# float32, values around 1, sums in another order
NEAR = 1e-5


def falcon(**settings):
    config = transformers.FalconConfig(
        vocab_size=16, hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=HEADS, **settings
    )
    return transformers.FalconForCausalLM(config)


def bloom():
    config = transformers.BloomConfig(vocab_size=16, hidden_size=SIZE, n_layer=2, n_head=HEADS)
    return transformers.BloomForCausalLM(config)


class Glm(nn.Module):
    """The names and rows of ChatGLM-6B's and VisualGLM's projection, without the rest."""

    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(16, SIZE)
        self.query_key_value, self.dense = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, ids):
        x = self.query_key_value(self.word_embeddings(ids))
        q, k, v = x.view(*ids.shape, HEADS, 3 * DIM).split(DIM, -1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.dense(torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2))


def blockwise():
    config = transformers.GPT2Config(vocab_size=16, n_embd=SIZE, n_layer=2, n_head=HEADS)
    return transformers.GPT2LMHeadModel(config)


LAYOUTS = {
    "Falcon 7B": (lambda: falcon(multi_query=True, new_decoder_architecture=False, bias=False),
                  "query_key_value", per_group(HEADS, 1, DIM)),
    "Falcon 40B": (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, bias=False),
                   "query_key_value", per_group(HEADS, 2, DIM)),
    "Falcon RW": (lambda: falcon(multi_query=False, new_decoder_architecture=False, alibi=True,
                                 bias=True), "query_key_value", per_head(HEADS, DIM)),
    "BLOOM, TigerBot": (bloom, "query_key_value", per_head(HEADS, DIM)),
    "ChatGLM, VisualGLM": (Glm, "query_key_value", per_head(HEADS, DIM)),
    "GPT-2": (blockwise, "c_attn", blocks({"q": SIZE, "k": SIZE, "v": SIZE})),
}  # fmt: skip


def plain(make):
    torch.manual_seed(0)
    model = make().eval()
    model.requires_grad_(False)
    return model


def with_slices(make, target, rows, **settings):
    model = plain(make)
    mp.inject(model, [target], lambda base: LoRAFusedLinear(
        base, {"q": 2, "v": 3}, {"q": 4, "v": 5}, slices=rows, **settings))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def output(model):
    with torch.no_grad():
        found = model(IDS)
    return getattr(found, "logits", found)


def described(model):
    return {n: (tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_gives_back_the_slices(layout, four_bit, tmp_path):
    make, target, rows = LAYOUTS[layout]

    def base():
        model = plain(make)
        if four_bit:
            weights = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
            chosen = [name for name in weights if not name.endswith(target)]
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # FalconLinear is made 4-bit without also=
                mp.quantize_model(model, skip=chosen)
        return model

    model, again = with_slices(base, target, rows), base()
    mp.save_peft(model, tmp_path)
    names = mp.load_peft(again, tmp_path)
    assert all(isinstance(again.get_submodule(name), LoRAFusedLinear) for name in names)
    assert described(again) == described(model)
    assert torch.equal(output(again), output(model))
    assert mp.count_parameters(again) == mp.count_parameters(model)
    change = output(model) - output(base())
    assert change.abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_computes_the_same_from_the_file(layout, tmp_path):
    """For PEFT it is one pair of factors over the whole output, zero outside the slices."""
    peft = pytest.importorskip("peft")
    make, target, rows = LAYOUTS[layout]
    model = with_slices(make, target, rows)
    mp.save_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain(make)), tmp_path)
    assert (output(theirs) - output(model)).abs().max() < NEAR
    # what PEFT writes after training is such a pair, and no slices: ours reads it as what it is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert "slices" not in json.dumps(config)
    dense = plain(make)
    for name in mp.load_peft(dense, tmp_path / "theirs"):
        assert isinstance(dense.get_submodule(name), mp.LoRALinear)
    assert (output(dense) - output(model)).abs().max() < NEAR


def test_falcons_own_linear_is_made_4_bit_without_also():
    model = plain(LAYOUTS["Falcon 7B"][0])
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)}
    assert "FalconLinear" in kinds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = mp.quantize_model(model)
    assert len(names) == 2 * 4 and not [n for n, m in model.named_modules()
                                        if type(m).__name__ == "FalconLinear"]  # fmt: skip


def test_a_linear_that_computes_something_else_is_refused_with_the_way_to_vouch_for_it():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="also="):
        mp.NF4Linear.from_linear(Scaled(64, 64))
    model = nn.Sequential(Scaled(64, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match=r"0 dense.*also=\(Scaled,\)"):
        assert mp.quantize_model(model) == ["1"]
