"""PandaGPT (yxuansu/PandaGPT: code/model/openllama.py), small and random.

A frozen encoder (ImageBind) gives one vector for an image or a sound; llama_proj makes one token
of it: "### Human: <Img>x</Img> question\\n### Assistant: answer\\n###"; answers alone train.
Vicuna gets LoRA on q, k, v, o, rank 32, alpha 32, dropout .1, and llama_proj trains whole: 5e-4
with warm-up and decay, weight decay .001, clip 1, betas .9 and .95.  The vectors are random here.
"""

import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from common import IGNORED, batches, mean_loss, tiny_llama, train, train_tokenizer
from torch import Tensor, nn

import minipeft as mp
from minipeft.io.lora import load_lora

torch.manual_seed(0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
tokenizer = train_tokenizer()
head = tokenizer("### Human: <Img>", return_tensors="pt").input_ids


class Panda(nn.Module):
    """Vicuna behind one token made of a vector of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.llama_model = tiny_llama(len(tokenizer))
        self.llama_proj = nn.Linear(32, 64)

    def forward(self, vector: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor):
        embed, size = self.llama_model.get_input_embeddings(), len(input_ids)
        front = [embed(head).expand(size, -1, -1), self.llama_proj(vector)[:, None]]
        states = torch.cat([*front, embed(input_ids)], 1)
        added = states.shape[1] - input_ids.shape[1]
        return self.llama_model(
            inputs_embeds=states,
            attention_mask=nn.functional.pad(attention_mask, (added, 0), value=1),
            labels=nn.functional.pad(labels, (added, 0), value=IGNORED),
        )


data = [
    {**one, "vector": torch.randn(len(one["labels"]), 32)}
    for one in batches(tokenizer, "pandagpt", length=128)
]
model = Panda().eval()
names = mp.inject_lora(model, TARGETS, rank=32, alpha=32, dropout=0.1)
mp.train_modules(model, ["llama_proj"])
before, after = train(
    model, data, lr=5e-4, faster=5, schedule="linear", warmup=0.1, weight_decay=0.001,
    betas=(0.9, 0.95),
)  # fmt: skip
used = [one["vector"].flip(0) for one in data]
other = mean_loss(model, [{**one, "vector": v} for one, v in zip(data, used, strict=True)])
print(
    f"{len(names)} layers, llama_proj: loss {before:.3f} -> {after:.3f}; others' images {other:.3f}"
)

theirs = OrderedDict()  # their pytorch_model.pt: what trains, under PEFT's names in llama_model
for name in names:
    layer, own = model.get_submodule(name), name.removeprefix("llama_model.")
    for part, value in (("A", layer.lora_a), ("B", layer.lora_b)):
        theirs[f"llama_model.base_model.model.{own}.lora_{part}.default.weight"] = value
for part in ("weight", "bias"):
    theirs[f"llama_proj.{part}"] = nn.Parameter(getattr(model.llama_proj, part).detach())
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "pytorch_model.pt"
    torch.save(theirs, path)
    again = Panda().eval()
    load_lora(again, path, alpha=32, whole=["llama_proj"])
loaded = mean_loss(again, data)
print(f"their file of {len(theirs)} tensors, loaded: {loaded:.3f}")

assert after < before and loaded == after
assert other != after  # the image is read
