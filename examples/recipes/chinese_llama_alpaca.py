"""Chinese-LLaMA-Alpaca (ymcui/Chinese-LLaMA-Alpaca: run_pt.sh, run_sft.sh, merge script), small.

Two adapters on each other.  First a longer vocabulary, pre-trained on text: LoRA on q, k, v, o,
gate, down, up (rank 8, alpha 32, dropout .05) and both tables whole, 2e-4 and a cosine, weight
decay .01, warm-up .05, all tokens train.  Then instructions: one more token to pad with, 1e-4, no
decay, warm-up .03, "### Response: " with a space, the prompt masked.  Whoever has LLaMA merges the
two in order; another order, or one of them twice, gives another model, and is refused here.
"""

import tempfile
from pathlib import Path

import torch
from common import (
    CHINESE,
    TEMPLATES,
    WORDS,
    batch,
    encode_turns,
    tiny_llama,
    train,
    train_tokenizer,
)  # fmt: skip

import minipeft as mp

TEXT = "".join(turn for talk in CHINESE for turn in talk)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]

tokenizer = train_tokenizer("<unk>", "<s>", "</s>")
old, pieces = len(tokenizer), len(tokenizer(TEXT).input_ids)
tokenizer.add_tokens(WORDS)
longer = len(tokenizer(TEXT).input_ids)
print(f"{len(WORDS)} new tokens: {pieces} pieces of the text become {longer}")


def stage(model: torch.nn.Module, rows: int, data: list, folder: Path, **rates: float) -> tuple:
    """New rows, LoRA on all linear layers, a few steps, and the adapter's files."""
    mp.extend_vocabulary(model, rows, whole_table=True)
    mp.inject_lora(model, LINEAR, rank=8, alpha=32, dropout=0.05)
    losses = train(model, data, faster=10, schedule="cosine", **rates)
    mp.save_peft(model, folder)
    return losses


with tempfile.TemporaryDirectory() as place:
    first, second = Path(place) / "chinese-llama", Path(place) / "chinese-alpaca"
    plain = [encode_turns(tokenizer, TEMPLATES["tigerbot"], t, everything=True) for t in CHINESE]
    llama = tiny_llama(old)
    pre = stage(llama, len(WORDS), [batch(plain)], first, lr=2e-4, warmup=0.05, weight_decay=0.01)
    print(f"pre-training: loss {pre[0]:.3f} -> {pre[1]:.3f}")

    mp.remove(llama, merge=True)  # what the second adapter is trained on
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = [encode_turns(tokenizer, TEMPLATES["chinese-alpaca"], talk) for talk in CHINESE]
    data = [batch(rows, tokenizer.pad_token_id)]
    sft = stage(llama, 1, data, second, lr=1e-4, warmup=0.03)
    print(f"instructions: loss {sft[0]:.3f} -> {sft[1]:.3f}")

    merged = tiny_llama(old)
    report = mp.merge_in_order(merged, [first, second])
    off = (merged(**data[0]).logits - llama(**data[0]).logits).abs().max().item()
    print(f"rows {old} > {report.steps[0].rows_after} > {report.steps[1].rows_after}; "
          f"merged in order, off by {off:.0e}")  # fmt: skip
    refused = 0
    for wrong in ([second, first], [first, first]):
        try:
            mp.merge_in_order(tiny_llama(old), wrong)
        except ValueError:
            refused += 1

assert pre[1] < pre[0] and sft[1] < sft[0] and longer < pieces
assert off < 1e-4  # logits of up to 10 in float32, whose products are summed in another order
assert refused == 2
