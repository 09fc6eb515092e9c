"""TigerBot (TigerResearch/TigerBot: train_with_qlora.py), BLOOM and LLaMA-2, small and random.

NF4 with double quantisation, every 4-bit linear layer but the head, rank 64, alpha 16, no dropout.
`instruction \\n answer </s>`, the prompt masked; theirs tokenises the two apart, here it is one
text.  Rates are left to the command line there; 1e-5 is that of their full training.
BLOOM's query_key_value has q, k, v of each head: one adapter over all of it, as PEFT has it.
"""

import tempfile

import torch
from common import IGNORED, batches, mean_loss, tiny_llama, train, train_tokenizer
from transformers import BloomConfig, BloomForCausalLM

import minipeft as mp

tokenizer = train_tokenizer()
data = batches(tokenizer, "tigerbot")


def build(kind: str) -> torch.nn.Module:
    """The same random weights each time."""
    torch.manual_seed(0)
    if kind == "LLaMA-2":
        return tiny_llama(
            len(tokenizer), hidden_size=128, num_key_value_heads=2
        )  # the 70B has groups
    return BloomForCausalLM(BloomConfig(
        vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, bos_token_id=1,
        eos_token_id=2, initializer_range=0.1,
    )).eval()  # fmt: skip


for kind in ("BLOOM", "LLaMA-2"):
    model = build(kind)
    names = mp.inject_qlora(model, "all-linear", rank=64, alpha=16)
    before, after = train(model, data, lr=1e-5, faster=100)
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        other = build(kind)
        mp.quantize_model(other)  # the base of the adapter is 4-bit
        mp.load_peft(other, folder)
    again = mean_loss(other, data)
    print(f"{kind}: {len(names)} layers, loss {before:.3f} -> {after:.3f}; loaded {again:.3f}")
    assert after < before and again == after
    assert not any("lm_head" in name for name in names)

ends = [
    [i for i, label in enumerate(row) if label != IGNORED] for row in data[0]["labels"].tolist()
]
print("an answer's tokens stand together:", all(e == [*range(e[0], e[-1] + 1)] for e in ends))
assert all(e == [*range(e[0], e[-1] + 1)] for e in ends)
