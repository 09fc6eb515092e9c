"""VisualGLM-6B (THUDM/VisualGLM-6B: finetune_visualglm.py), small and random.

An image becomes queries of a Q-Former, which stand in the text for padding tokens:
`<img>` + pads + `</img>问：..答：[gMASK] <bos> answer <eop>`; the answer trains.  LoRA is on
query_key_value (three pairs, whose rows lie head by head) and dense of the layers 0 and 14, rank
10, alpha 1, no dropout; 1e-4 and a cosine after a warm-up of .02.  Here the layers are 0 and 2 of
4, the images random, and the vision tower one frozen layer with 4 queries.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import IGNORED, batches, mean_loss, train, train_tokenizer
from glm import GLM, GLMConfig
from torch import Tensor, nn

import minipeft as mp
from minipeft.io.lora import load_lora
from minipeft.layers.fused import LoRAFusedLinear, per_head

torch.manual_seed(0)
QUERIES, ROWS = 4, per_head(4, 16)
LAYERS = [f"transformer.layers.{i}.attention" for i in (0, 2)]


class VisualGLM(GLM):
    """GLM with the queries of an image in the place of the first tokens but one."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.query, self.glm_proj = nn.Parameter(torch.randn(QUERIES, 32)), nn.Linear(32, 64)
        self.qformer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, input_ids: Tensor, image: Tensor, labels: Tensor | None = None) -> object:
        found = self.glm_proj(self.qformer(self.query.expand(len(image), -1, -1), image))
        text = self.get_input_embeddings()(input_ids)
        states = torch.cat([text[:, :1], found, text[:, QUERIES + 1 :]], 1)
        return super().forward(input_ids, inputs_embeds=states, labels=labels)


def build() -> VisualGLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    return VisualGLM(GLMConfig(len(tokenizer), num_layers=4, initializer_range=0.1)).eval()


tokenizer = train_tokenizer("<unk>", "[gMASK]", "<bos>", "<eop>", "<img>", "</img>", "<pad>")
head = tokenizer("<img>" + "<pad>" * QUERIES + "</img>", return_tensors="pt").input_ids
data = []
for one in batches(tokenizer, "visualglm", length=80):
    size = len(one["labels"])
    ids = torch.cat([head.expand(size, -1), one["input_ids"]], 1)
    labels = torch.cat([torch.full_like(head, IGNORED).expand(size, -1), one["labels"]], 1)
    data.append({"input_ids": ids, "labels": labels, "image": torch.randn(size, 9, 32)})

model = build()
names = mp.inject(model, [f"{layer}.query_key_value" for layer in LAYERS],
                  lambda base: LoRAFusedLinear(base, 10, 1, slices=ROWS))  # fmt: skip
names += mp.inject(model, [f"{layer}.dense" for layer in LAYERS],
                   lambda base: mp.LoRALinear(base, 10, 1))  # fmt: skip
before, after = train(model, data, lr=1e-4, faster=100, schedule="cosine", warmup=0.02)
print(f"{len(names)} layers: loss {before:.3f} -> {after:.3f}")

sat: dict[str, Tensor] = {}  # as SwissArmyTransformer names them
for layer in LAYERS:
    fused = model.get_submodule(f"{layer}.query_key_value")
    for i, (a, b) in enumerate(fused.slice_factors().values()):
        sat |= {f"{layer}.query_key_value.matrix_{x}.{i}": t.detach().clone()
                for x, t in (("A", a), ("B", b))}  # fmt: skip
    dense = model.get_submodule(f"{layer}.dense")
    sat |= {
        f"{layer}.dense.matrix_A": dense.lora_a.data,
        f"{layer}.dense.matrix_B": dense.lora_b.data,
    }
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "mp_rank_00_model_states.pt"
    torch.save({"module": sat, "args": argparse.Namespace(lora_rank=10)}, path)
    again = build()
    load_lora(again, path, alpha=1, slices={"query_key_value": ROWS})
loaded = mean_loss(again, data)
print(f"{len(sat)} factors in a file of theirs, loaded: {loaded:.3f}")

assert after < before and loaded == after
