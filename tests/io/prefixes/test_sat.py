"""SAT's list of prefixes, beside its arithmetic: keys and values after the text's own."""

import argparse

import pytest
import torch

import minipeft as mp
from minipeft.io.prefixes import load_sat_prefix

transformers = pytest.importorskip("transformers")

HEADS, DIM, LENGTH, LAYERS = 2, 8, 3, 2


def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=HEADS * DIM, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tensors(layers=LAYERS, heads=HEADS):
    made = [torch.randn(2, heads, LENGTH, DIM) for _ in range(layers)]
    return {f"mixins.ptuning.prefix.{i}": value for i, value in enumerate(made)}


def test_attention_sees_keys_after_the_texts(tmp_path):
    """SAT's: keys and values of the text, then the prefix's, which every token sees."""
    state = tensors()
    encoder = mp.PrefixEncoder([(HEADS, DIM, DIM)] * LAYERS, LENGTH)
    load_sat_prefix(encoder, state)
    q, k, v = (torch.randn(1, HEADS, 5, DIM) for _ in range(3))
    for layer, (own_k, own_v) in enumerate(encoder()):
        found = mp.prefix_attention(q, k, v, own_k, own_v)
        their_k, their_v = state[f"mixins.ptuning.prefix.{layer}"]
        keys, values = torch.cat([k[0], their_k], 1), torch.cat([v[0], their_v], 1)
        mask = torch.ones(5, 5).tril().bool()
        mask = torch.cat([mask, torch.ones(5, LENGTH).bool()], 1)
        scores = (q[0] @ keys.mT / DIM**0.5).masked_fill(~mask, -torch.inf)
        # float32, 8 numbers in another order
        assert (found[0] - scores.softmax(-1) @ values).abs().max() < 1e-6


def test_a_file_is_attached(tmp_path):
    state = tensors()
    file = {"module": state, "args": argparse.Namespace(pre_seq_len=LENGTH), "iteration": 3}
    torch.save(file, tmp_path / "a.pt")
    own = model()
    plain = own(torch.tensor([[1, 2, 3]])).logits
    prefix = load_sat_prefix(own, tmp_path / "a.pt")
    assert prefix.position == "none"
    for (k, v), value in zip(prefix.encoders["default"](), state.values(), strict=True):
        assert torch.equal(k, value[0]) and torch.equal(v, value[1])
    assert sum(p.numel() for p in own.parameters() if p.requires_grad) == sum(
        value.numel() for value in state.values()
    )
    logits = own(torch.tensor([[1, 2, 3]])).logits
    assert not torch.allclose(logits, plain)
    mp.save_prefix(own, tmp_path / "own")
    again = model()
    mp.load_prefix(again, tmp_path / "own")
    assert torch.equal(again(torch.tensor([[1, 2, 3]])).logits, logits)


WRONG = {
    "heads": (tensors(heads=4), r"\(4, 8, 8\).*this model has 2 of \(2, 8, 8\)"),
    "layers": (tensors(3), "3 layers"),
    "a gap": ({k: v for k, v in tensors(3).items() if not k.endswith("1")}, r"layers \[0, 2\]"),
    "none": ({"a": torch.ones(1)}, r"layers \[\], expected mixins.ptuning.prefix.0"),
    "NaN": ({k: v * float("nan") for k, v in tensors().items()}, "NaN"),
    "two lengths": ({**tensors(1), "mixins.ptuning.prefix.1": torch.ones(2, HEADS, 4, DIM)},
                    "layer 1 is torch.float32"),
    "twice": ({**tensors(), "prefix.1": torch.ones(2, HEADS, LENGTH, DIM)}, "two prefixes of"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lists_are_refused_and_the_model_is_as_it_was(case):
    state, message = WRONG[case]
    own = model()
    before = own(torch.tensor([[1, 2, 3]])).logits
    with pytest.raises(ValueError, match=message):
        load_sat_prefix(own, state)
    assert torch.equal(own(torch.tensor([[1, 2, 3]])).logits, before)
