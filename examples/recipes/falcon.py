"""Falcon in its three forms, by QLoRA, with an adapter for each of q, k and v in the fused layer.

Falcon's linear layers are a subclass of nn.Linear with a forward of their own, which a probe finds
to be x W^T + b: they become 4-bit as others do.  query_key_value holds q | k | v (7B: 71 query
heads, one key, one value), groups of queries with their key and value (40B), or q k v of each head
(RW, with ALiBi).  Falcon's authors published no adapter recipe; the numbers are QLoRA's: rank 64,
alpha 16, dropout .1, 2e-4 constant, warm-up .03, clip .3, every linear layer but the head.
"""

import torch
from common import batches, train, train_tokenizer
from transformers import FalconConfig, FalconForCausalLM

import minipeft as mp
from minipeft.layers.fused import LoRAFusedLinear, per_group, per_head

HEADS, SIZE = 4, 16
FORMS = {
    "7B": ({"multi_query": True}, per_group(HEADS, 1, SIZE)),
    "40B": (
        {"new_decoder_architecture": True, "num_kv_heads": 2}, per_group(HEADS, 2, SIZE)
    ),
    "RW": ({"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
           per_head(HEADS, SIZE)),
}  # fmt: skip
tokenizer = train_tokenizer()
data = batches(tokenizer, "guanaco", everything=True)

for form, (settings, rows) in FORMS.items():
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(
        vocab_size=len(tokenizer), hidden_size=HEADS * SIZE, num_hidden_layers=2,
        num_attention_heads=HEADS, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
        hidden_dropout=0.0, **settings,
    ))  # fmt: skip
    others = mp.inject_qlora(
        model, ["self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"], rank=64, alpha=16,
        dropout=0.1,
    )  # fmt: skip
    fused = mp.inject(
        model, ["query_key_value"],
        lambda base, rows=rows: LoRAFusedLinear(
            base, {"q": 64, "v": 64}, {"q": 16, "v": 16}, slices=rows, dropout=0.1
        ),
    )  # fmt: skip
    before, after = train(model, data, lr=2e-4, faster=10, warmup=0.03, clip=0.3)
    layer = model.get_submodule(fused[0])
    change = layer.delta()
    print(f"{form}: {len(others) + len(fused)} layers, loss {before:.3f} -> {after:.3f}")
    assert after < before
    assert not change[rows["k"]].any()  # the keys have no adapter
    assert change[rows["q"]].any() and change[rows["v"]].any()
