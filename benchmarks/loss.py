"""The loss that methods train on and are validated by: replies of conversations.

Each class here is a function with settings that another process can be given.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import IGNORED, Batches
from benchmarks.models import LlamaSizes, enable_checkpointing, load_model

ALL_OF_IT = "_logits_are_its_heads_alone"  # what MakeModel marks a folder's model with
CHUNK = 256  # rows of logits at a time


class Step(NamedTuple):
    """A batch, and which of its tokens are followed by one that is learnt (`learnt_of`).

    Known before, so that predict_memory can run the loss where tensors have no values.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    learnt: Tensor


def learnt_of(labels: Tensor) -> Tensor:
    """Numbers of the tokens whose next one is learnt, counted through all rows, int64."""
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    return (following.flatten() != IGNORED).nonzero().squeeze(1)


def decoder_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The transformer without its head, and the head, through PEFT's wrapper if there is one."""
    inner = _inner(model)
    return inner.base_model, inner.get_output_embeddings()


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_is_all(model: Any) -> bool:
    """Whether logits are the head of the transformer's last states, and nothing more.

    Gemma 2 caps them and Cohere scales them, for example; the model is tried on two tokens.
    """
    decoder, head = decoder_and_head(model)
    ids = torch.tensor([[1, 2]], device=model.device)
    if head is None:
        return False
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.equal(head(decoder(input_ids=ids, use_cache=False).last_hidden_state), logits)


def loss_of(model: Any, batch: Batches | Step, *, chunked: bool = False) -> Tensor:
    """Mean cross-entropy of the next token where it is learnt.

    Logits are computed for those positions only: over a vocabulary of 49,152 they would take more
    memory than everything that the methods differ in.  A model that does more than its head
    (`MakeModel` marks it) computes all of them.  `chunked` lets torch compute them and their
    gradients a few rows at a time; the loss has then the dtype of the model.

    Raises:
        ValueError: chunked, and the model does more than its head.
    """
    if not getattr(_inner(model), ALL_OF_IT, True):
        if chunked:
            raise ValueError(
                f"--chunked-loss: {type(_inner(model)).__name__} does more to its logits than its "
                "head; leave it out"
            )
        found = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        wanted = batch.labels[:, 1:].flatten()
        every = found.logits[:, -batch.labels.shape[1] : -1].flatten(0, 1).float()
        return F.cross_entropy(every, wanted, ignore_index=IGNORED)
    decoder, head = decoder_and_head(model)
    # transformers reads the mask's values, which predict_memory's tensors do not have: there a text
    # is not padded, as in its own loss
    mask = None if batch.attention_mask.is_meta else batch.attention_mask
    hidden = decoder(
        input_ids=batch.input_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    learnt = batch.learnt if isinstance(batch, Step) else learnt_of(batch.labels)
    rows, own = hidden.flatten(0, 1)[learnt], batch.labels.flatten()[learnt + 1]
    if chunked:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
        return F.linear_cross_entropy(rows, head.weight, own, options=options)
    return F.cross_entropy(head(rows).float(), own)


@dataclass(frozen=True)
class MakeModel:
    """SmolLM2, a LLaMA of given sizes, or a folder of Hugging Face's."""

    sizes: LlamaSizes | None
    dtype: torch.dtype
    seed: int
    checkpointing: bool
    folder: str | None = None

    def __call__(self) -> Any:
        model = load_model(self.sizes, self.dtype, self.seed, self.folder)
        if self.folder is not None:
            setattr(model, ALL_OF_IT, head_is_all(model.eval()))
        if self.checkpointing:
            enable_checkpointing(model)
        return model


@dataclass(frozen=True)
class MakeBatch:
    """A step's rows of the batches in a safetensors file."""

    path: str
    size: int

    def __call__(self, step: int) -> Step:
        rows = load_batches(self.path, "train").rows(step * self.size, (step + 1) * self.size)
        return Step(*rows, learnt_of(rows.labels))


@dataclass(frozen=True)
class Validation:
    """The loss on rows that were not trained on, weighted by learnt tokens.

    The model stays in train() mode, which changes nothing here (no dropout): eval() makes
    bitsandbytes repack its weights on some CPUs, after which it trains wrongly.
    """

    path: str
    size: int
    device: str

    def __call__(self, model: Any) -> dict[str, float]:
        batches, total, count = load_batches(self.path, "validation"), 0.0, 0.0
        with torch.no_grad():
            for first in range(0, len(batches.input_ids), self.size):
                rows = batches.rows(first, first + self.size)
                batch = Batches(*(tensor.to(self.device) for tensor in rows))
                learnt = float((batch.labels[:, 1:] != IGNORED).sum())
                total += float(loss_of(model, batch)) * learnt
                count += learnt
        return {"validation_loss": total / count}


def load_batches(path: str, part: str) -> Batches:
    """Training or validation batches that the parent process wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return Batches(*(file.get_tensor(f"{part}.{field}") for field in Batches._fields))
