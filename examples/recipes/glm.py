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

    def __init__(
        self, vocab_size: int = 64, hidden_size: int = 64, num_layers: int = 2,
        num_attention_heads: int = 4, gmask_token_id: int = 1, bos_token_id: int = 2, **more: Any,
    ) -> None:  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.num_attention_heads, self.gmask_token_id = num_attention_heads, gmask_token_id
        super().__init__(bos_token_id=bos_token_id, **more)


def turned(x: Tensor, numbers: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary positions: x (tokens, batch, heads, size) turned by numbers (batch, tokens)."""
    angles = (numbers.T[..., None] * inv_freq).repeat(1, 1, 2)[:, :, None]
    left, right = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()


class Rotary(nn.Module):
    """The frequencies, under the name that checkpoints have for them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, size, 2) / size))


class SelfAttention(nn.Module):
    """query_key_value has, for each head, its query, key and value rows."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rotary_emb = Rotary(width // self.heads // 2)

    def forward(
        self, x: Tensor, position_ids: Tensor, attention_mask: Tensor,
        layer_past: Pair | None = None, use_cache: bool = False,
    ) -> tuple[Tensor, Pair | None]:  # fmt: skip
        q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, -1)
        q, k = (
            torch.cat([turned(half, position_ids[:, i], self.rotary_emb.inv_freq)
                       for i, half in enumerate(t.chunk(2, -1))], -1)
            for t in (q, k)
        )  # fmt: skip
        if layer_past is not None:
            k, v = torch.cat([layer_past[0], k]), torch.cat([layer_past[1], v])
        q, keys, values = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, keys, values, ~attention_mask)  # True hides
        return self.dense(y.permute(2, 0, 1, 3).flatten(2)), (k, v) if use_cache else None


class MLP(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(width, 4 * width), nn.Linear(
            4 * width, width
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class GLMBlock(nn.Module):
    """The residual is the normalised input, sqrt(2 layers) times (published: 28 layers)."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        width, self.alpha = config.hidden_size, (2 * config.num_layers) ** 0.5
        self.input_layernorm, self.attention = nn.LayerNorm(width), SelfAttention(config)
        self.post_attention_layernorm, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(
        self, x: Tensor, position_ids: Tensor, attention_mask: Tensor,
        layer_past: Pair | None, use_cache: bool,
    ) -> tuple[Tensor, Pair | None]:  # fmt: skip
        x = self.input_layernorm(x)
        y, pair = self.attention(
            x, position_ids, attention_mask, layer_past=layer_past, use_cache=use_cache
        )
        x = self.post_attention_layernorm(x * self.alpha + y)
        return x * self.alpha + self.mlp(x), pair


class GLM(PreTrainedModel):
    """The language model: `transformer.layers...` and `lm_head`, random weights."""

    config_class = GLMConfig
    base_model_prefix = "transformer"

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.transformer = nn.Module()
        self.transformer.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer.layers = nn.ModuleList(GLMBlock(config) for _ in range(config.num_layers))
        self.transformer.final_layernorm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        answer = places >= start
        first = torch.where(answer, gmask, places)
        return torch.stack([first, torch.where(answer, places - start + 1, 0)], 1), start

    @property
    def special(self) -> tuple[int, int]:
        """The ids of [gMASK] and <bos>."""
        return self.config.gmask_token_id, self.config.bos_token_id

    def forward(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: tuple[Pair, ...] | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        seen = 0 if past_key_values is None else past_key_values[0][0].shape[0]
        tokens = input_ids.shape[1]
        mask = torch.ones(tokens, seen + tokens, dtype=torch.bool, device=input_ids.device)
        mask = mask.triu(seen + 1)[None, None].repeat(len(input_ids), 1, 1, 1)
        if not seen:
            numbers, start = self.positions(input_ids)
            mask &= torch.arange(tokens, device=mask.device) >= start[:, None, None]
            position_ids = numbers if position_ids is None else position_ids
        elif position_ids is None:
            raise ValueError("pass position_ids with a cache: it has no [gMASK] to count from")
        x = self.transformer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        x, kept = x.transpose(0, 1), []
        for layer, past in zip(
            self.transformer.layers,
            past_key_values or [None] * len(self.transformer.layers), strict=True,
        ):  # fmt: skip
            x, pair = layer(x, position_ids, mask, past, use_cache)
            kept.append(pair)
        logits = self.lm_head(self.transformer.final_layernorm(x)).transpose(0, 1)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits, tuple(kept) if use_cache else None)

    @torch.no_grad()
    def answer(self, input_ids: Tensor, new: int, *, use_cache: bool = True) -> Tensor:
        """The likeliest next tokens, one after the other: (batch, tokens + new)."""
        ids, past = input_ids, None
        for _ in range(new):
            numbers = self.positions(ids)[0]
            step = ids if past is None else ids[:, -1:]
            out = self(
                step, position_ids=numbers[..., -step.shape[1] :], past_key_values=past,
                use_cache=use_cache,
            )  # fmt: skip
            past = out.past_key_values
            ids = torch.cat([ids, out.logits[:, -1].argmax(-1, True)], 1)
        return ids
