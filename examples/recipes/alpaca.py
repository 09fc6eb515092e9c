"""Stanford Alpaca (tatsu-lab/stanford_alpaca: train.py, weight_diff.py), small and random.

All weights train; the prompt is masked.  LLaMA has no token to pad with: [PAD] gets a row of its
own, the mean of the others.  Theirs counts the tokens of the prompt alone, which is off where its
end and the answer's start make one token; labels by characters are not.  What is published is the
difference from LLaMA in float32 ([PAD]'s row: from the mean) and the sum of all numbers, so that
nobody adds it to another base.  2e-5 is their README's; the warm-up of .03 and the cosine are ours,
as theirs are not in the code.
"""

import tempfile
from pathlib import Path

import torch
from common import batches, tiny_llama, train, train_tokenizer
from transformers import LlamaForCausalLM

from minipeft.io.delta import apply_delta, make_delta

tokenizer = train_tokenizer("<unk>", "<s>", "</s>")
model = tiny_llama(len(tokenizer))
with tempfile.TemporaryDirectory() as folder:
    base, tuned, diff, made = (Path(folder) / name for name in ("base", "tuned", "diff", "made"))
    model.save_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[-1] = table.weight[:-1].mean(0)
    before, after = train(
        model, batches(tokenizer, "alpaca"), lr=2e-5, faster=50, schedule="cosine", warmup=0.03
    )
    print(f"all weights: loss {before:.3f} -> {after:.3f}")

    model.save_pretrained(tuned)
    total = sum(t.double().sum().item() for t in model.state_dict().values())
    make_delta(base, tuned, diff, dtype=torch.float32, rows="mean")
    apply_delta(base, diff, made, published_sum=total)
    again = LlamaForCausalLM.from_pretrained(made).state_dict()
    equal = all(torch.equal(again[name], t) for name, t in model.state_dict().items())
    print(f"base + difference is the tuned model in every bit: {equal}")
    try:
        apply_delta(tuned, diff, Path(folder) / "twice")
        refused = False
    except ValueError as error:
        refused, message = True, str(error)
        print(f"added to the tuned model: {message.replace(folder, '')[:90]} ..")

assert after < before and equal and refused
