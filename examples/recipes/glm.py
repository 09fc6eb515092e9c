"""The architecture of ChatGLM-6B and VisualGLM, with the names that their checkpoints have.

Their own code is for transformers 4; this module computes the same.  A text is
`context [gMASK] <bos> answer`: tokens before <bos> see each other, later ones what is before them.
Each token has two numbers: its place in the context (later ones: that of [gMASK]), and its place
in the answer (0 in the context).  Half of each head is turned by the one, half by the other.
Tensors go (tokens, batch, ...); layers take and give their past in tuples.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Pair = tuple[Tensor, Tensor]


class GLMConfig(PreTrainedConfig):
    """Sizes and special tokens, named as in ChatGLM-6B's config.json."""

    model_type = "chatglm"

    def __init__(self, vocab_size: int = 64, hidden_size: int = 64, num_layers: int = 2,
                 num_attention_heads: int = 4, gmask_token_id: int = 1, bos_token_id: int = 2,
                 **more: Any) -> None:  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_attention_heads, self.gmask_token_id = num_attention_heads, gmask_token_id
        super().__init__(bos_token_id=bos_token_id, **more)


def turned(x: Tensor, numbers: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary positions: x (tokens, batch, heads, size) turned by numbers (batch, tokens)."""
    angles = (numbers.T[..., None] * inv_freq).repeat(1, 1, 2)[:, :, None]
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


class SelfAttention(nn.Module):
    """query_key_value has, for each head, its query, key and value rows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, size = heads, width // heads // 2
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", 1e4 ** (-torch.arange(0, size, 2) / size))

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor,
                layer_past: Pair | None = None, use_cache: bool = False) -> tuple:  # fmt: skip
        """The states, and keys and values where `use_cache`; the mask is True where it hides."""
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, -1)
        rotary, (first, second) = self.rotary_emb.inv_freq, position_ids.unbind(1)
        halves = (t.chunk(2, -1) for t in (q, k))
        q, k = (
            torch.cat([turned(a, first, rotary), turned(b, second, rotary)], -1) for a, b in halves
        )
        if layer_past is not None:
            k, v = torch.cat([layer_past[0], k]), torch.cat([layer_past[1], v])
        q, keys, values = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, keys, values, ~attention_mask)
        return self.dense(y.permute(2, 0, 1, 3).flatten(2)), (k, v) if use_cache else None


class GLMBlock(nn.Module):
    """The residual is the normalised input, sqrt(2 layers) times (theirs: always of 28 layers)."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.alpha, self.attention = (2 * layers) ** 0.5, SelfAttention(width, heads)
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(width) for _ in "12")
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(width, 4 * width),
                                  "dense_4h_to_h": nn.Linear(4 * width, width)})  # fmt: skip

    def forward(self, x: Tensor, position_ids: Tensor, attention_mask: Tensor,
                layer_past: Pair | None, use_cache: bool) -> tuple:  # fmt: skip
        x = self.input_layernorm(x)
        y, pair = self.attention(x, position_ids, attention_mask, layer_past, use_cache)
        x = self.post_attention_layernorm(x * self.alpha + y)
        inner = F.gelu(self.mlp.dense_h_to_4h(x), approximate="tanh")
        return x * self.alpha + self.mlp.dense_4h_to_h(inner), pair


class GLM(PreTrainedModel):
    """The language model, with random weights."""

    config_class = GLMConfig

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        width, sizes = config.hidden_size, (config.num_attention_heads, config.num_layers)
        self.transformer = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, width),
            "layers": nn.ModuleList(GLMBlock(width, *sizes) for _ in range(config.num_layers)),
            "final_layernorm": nn.LayerNorm(width),
        })  # fmt: skip
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.special = (config.gmask_token_id, config.bos_token_id)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def positions(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both numbers of each token, (batch, 2, tokens), and where the answers start."""
        if not all((input_ids == token).any(1).all() for token in self.special):
            raise ValueError(f"each text needs [gMASK] and <bos>, the ids {self.special}")
        gmask, start = ((input_ids == token).int().argmax(1, True) for token in self.special)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        context, answer = torch.where(places < start, places, gmask), (places - start + 1).clamp(0)
        return torch.stack([context, answer], 1), start

    def forward(self, input_ids: Tensor, inputs_embeds: Tensor | None = None,
                labels: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: tuple[Pair, ...] | None = None,
                use_cache: bool = False) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits, the loss of `labels`, and the past of each layer where `use_cache`."""
        past = past_key_values or [None] * len(self.transformer.layers)
        seen, tokens = len(past[0][0]) if past[0] else 0, input_ids.shape[1]
        mask = input_ids.new_ones(tokens, seen + tokens, dtype=torch.bool).triu(seen + 1)
        mask = mask[None, None].repeat(len(input_ids), 1, 1, 1)
        if not seen:
            numbers, start = self.positions(input_ids)
            mask &= torch.arange(tokens, device=mask.device) >= start[:, None, None]
            position_ids = numbers if position_ids is None else position_ids
        elif position_ids is None:
            raise ValueError("pass position_ids with a cache: it has no [gMASK] to count from")
        x = self.transformer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x, kept = x.transpose(0, 1), []
        for layer, pair in zip(self.transformer.layers, past, strict=True):
            x, pair = layer(x, position_ids, mask, pair, use_cache)
            kept.append(pair)
        logits = self.lm_head(self.transformer.final_layernorm(x)).transpose(0, 1)
        loss = None if labels is None else F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # fmt: skip
        return CausalLMOutputWithPast(loss, logits, tuple(kept) if use_cache else None)

    @torch.no_grad()
    def answer(self, input_ids: Tensor, new: int, *, use_cache: bool = True) -> Tensor:
        """The likeliest next tokens, one after the other: (batch, tokens + new)."""
        past, step = None, input_ids
        for _ in range(new):
            numbers = self.positions(input_ids)[0][..., -step.shape[1] :]
            out = self(step, position_ids=numbers, past_key_values=past, use_cache=use_cache)
            input_ids = torch.cat([input_ids, out.logits[:, -1].argmax(-1, True)], 1)
            past, step = out.past_key_values, input_ids[:, -1:] if use_cache else input_ids
        return input_ids
