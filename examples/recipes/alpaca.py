"""Stanford Alpaca (tatsu-lab/stanford_alpaca: train.py), on a small random LLaMA.

All weights train.  LLaMA has no token to pad with, so [PAD] gets a row of its own, the mean of the
others.  The prompt is masked.  Theirs counts the tokens of the prompt alone, which is off where
its end and the answer's start make one token; labels by characters are not.  The rates are not in
their code: 2e-5, warm-up .03 and a cosine are those of their README, the rate times 50 here since a
model of two layers learns slowly.
"""

import torch
from common import ALPACA, IGNORED, TEMPLATES, batches, encode_turns, tiny_llama, train
from common import train_tokenizer

torch.manual_seed(0)
tokenizer = train_tokenizer("<unk>", "<s>", "</s>")
model = tiny_llama(len(tokenizer))
tokenizer.add_special_tokens({"pad_token": "[PAD]"})
model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
with torch.no_grad():
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[-1] = table.weight[:-1].mean(0)
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

data = batches(tokenizer, "alpaca")
before, after = train(model, data, lr=1e-3, schedule="cosine", warmup=0.03)
print(f"all {sum(p.numel() for p in model.parameters()):,} weights: {before:.3f} -> {after:.3f}")
