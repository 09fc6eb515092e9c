"""MOSS (OpenLMLab/MOSS): CodeGen's architecture, all weights train on `<|Human|>` and `<|MOSS|>`.

Theirs: ZeRO-3 on 32 cards, 1.5e-5, 2 epochs, 4 texts a card; an answer ends in <eom>, which is the
end-of-text token of the model, a question in <eoh>.  The training script is not stored; meant is
that answers train with their <eom>.  The meta instruction is cut to its first line here.
The second part is what one card can do: LoRA on q and v, whose rows lie in 4 blocks of q, v, k.
"""

import torch
from common import IGNORED, batches, train, train_tokenizer
from transformers import CodeGenConfig, CodeGenForCausalLM

import minipeft as mp
from minipeft.layers.fused import LoRAFusedLinear, model_parallel

tokenizer = train_tokenizer("<unk>", "<eom>", "<eoh>", "<|Human|>", "<|MOSS|>")
eom, eoh = tokenizer.convert_tokens_to_ids(["<eom>", "<eoh>"])
data = batches(tokenizer, "moss", turns=4, length=160)
labels = torch.cat([one["labels"].flatten() for one in data])
print(f"learnt: {int((labels == eom).sum())} <eom>, {int((labels == eoh).sum())} <eoh>, "
      f"{int((labels != IGNORED).sum())} tokens in all")  # fmt: skip


def build() -> CodeGenForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    return CodeGenForCausalLM(CodeGenConfig(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256,
        n_ctx=256, bos_token_id=0, eos_token_id=eom, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.1,
    ))  # fmt: skip


model = build()
before, after = train(model, data, lr=1.5e-5, faster=100)
print(f"all weights: loss {before:.3f} -> {after:.3f}")

lora, rows = build(), model_parallel(4, 16)
names = mp.inject(
    lora, ["qkv_proj"], lambda base: LoRAFusedLinear(base, {"q": 8, "v": 8}, slices=rows)
)
first, last = train(lora, data, lr=3e-4, faster=10)
change = lora.get_submodule(names[0]).delta()
print(f"LoRA on q and v: loss {first:.3f} -> {last:.3f}")

assert after < before and last < first
assert (labels == eom).any() and not (labels == eoh).any()
assert not change[rows["k"]].any() and change[rows["q"]].any() and change[rows["v"]].any()
