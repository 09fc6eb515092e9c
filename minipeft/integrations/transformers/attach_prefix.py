"""attach_prefix: P-tuning v2 on any Hugging Face model.

A token or two runs through the model to see what reaches attention (probe.py); no name in the
config is trusted for that.  One module of the model, a Prefix (prefixes.py), holds the prefixes and
answers what attention asks (attention.py), or the cache where a model looks up no attention
(cache.py), or it comes as the past of each layer's attention (past.py).
"""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from minipeft.adapters.names import DEFAULT
from minipeft.integrations.transformers.attach import attach
from minipeft.integrations.transformers.prefixes import Prefix
from minipeft.model.peft_words import in_our_words
from minipeft.prefix import PrefixEncoder

_DEFAULTS = {
    "hidden": None, "embedding_dim": None, "dropout": 0.0, "init_std": 0.02, "frozen": 0,
    "gated": False,
}  # fmt: skip


@in_our_words
def attach_prefix(
    model: nn.Module,
    prefix_length: int | PrefixEncoder,
    *,
    name: str = DEFAULT,
    hidden: int | None = None,
    embedding_dim: int | None = None,
    dropout: float = 0.0,
    init_std: float = 0.02,
    frozen: int = 0,
    gated: bool = False,
    position: str | None = None,
    window: str | None = None,
    locations: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    example: dict[str, Any] | None = None,
    train_head: bool = True,
) -> Prefix:
    """Put a trainable prefix before the keys and values of every attention layer of `model`.

    For transformers models of any kind: decoders, encoders, encoder-decoders.  The prefix enters
    through the attention function (`sdpa` or `eager`), or through the cache where a model looks up
    no such function (Falcon, BLOOM, MPT, CodeGen, GPT-J), or as their layer's past where attention
    modules are handed it (ChatGLM-6B, MOSS).  Caches hold real tokens only and masks cover real
    tokens only: use the model as before.

    `position` "shift" numbers tokens from prefix_length on, as if the prefix were tokens (the
    convention of P-tuning v2 and PEFT); "none" numbers them from 0, so that an encoder keeps the
    full length of its position table.  None: "shift" for decoders, "none" for the others.  A gated
    prefix shifts no token: it starts as if there were no prefix.  Where models are reached through
    their cache, attention runs once more for each gated prefix (gates.py).

    `window` "always": layers with a sliding window, or that attend within chunks, see the prefix
    from everywhere; "like_token": as if it were tokens.  `locations` chooses among an
    encoder-decoder's "encoder", "decoder" and "cross" (attention of the decoder to the encoder's
    output); unless given, all that can be reached (`Prefix.report()` names what is left out, as
    LongT5's encoder).  `layers` chooses layers by the numbers that the model gives them; a model of
    which only some layers have attention (hybrids) needs it.

    Before the prefix stays, the model is tried on a few tokens (proof.py).  `example` is what such
    a trial cannot make up, as the keyword arguments of one forward: images, sounds, ids with
    special tokens, a longer text.

    A second prefix needs a `name`, and follows the first in position, window and locations;
    use_adapters chooses between them.  A new head for a task (score, classifier, qa_outputs) trains
    too, as in train_modules, unless `train_head` is False or the head trains already.  Other
    arguments are those of PrefixEncoder.  Freezes every parameter that no adapter owns.  The model
    gets a copy of its config, so that other models with the same config object are unaffected.

    A PrefixEncoder in the place of `prefix_length` is attached itself: it needs the model's layers
    (`Prefix.kv_shapes`), and brings its own length and settings.

    Warns if an MLP (`hidden`) has more than a tenth of the base's parameters, and of what could not
    be proved (`NotProvedWarning`).

    Raises:
        TypeError: not a transformers model.
        ValueError: a model whose attention cannot be reached in every layer (the message says what
            was tried), that fails a trial (with the difference and the effect), or that needs an
            example; an example that does not fit; another attention implementation, a name that is
            taken, a length below 1 or beyond the position table, a position or window that the
            model cannot have.  The model is then as it was.
    """

    settings: dict[str, Any] = {
        "hidden": hidden, "embedding_dim": embedding_dim, "dropout": dropout,
        "init_std": init_std, "frozen": frozen, "gated": gated,
    }  # fmt: skip
    own = prefix_length if isinstance(prefix_length, PrefixEncoder) else None
    if own is not None and settings != _DEFAULTS:
        given = [word for word, value in settings.items() if value != _DEFAULTS[word]]
        raise ValueError(f"attach_prefix: the encoder has settings of its own; leave out {given}")
    length: int = prefix_length if own is None else own.prefix_length  # type: ignore[assignment]

    def make(prefix: Prefix) -> PrefixEncoder:
        encoder = own or PrefixEncoder(prefix.kv_shapes, length, **settings)
        if encoder.kv_shapes != prefix.kv_shapes:
            raise ValueError(
                f"attach_prefix: the encoder has layers {encoder.kv_shapes[:2]} "
                f"({len(encoder.kv_shapes)}); the model's prefixes {prefix.kv_shapes[:2]} "
                f"({len(prefix.kv_shapes)})"
            )
        if any(encoder is other for other in prefix.encoders.values()):
            raise ValueError("attach_prefix: the model has this encoder already; copy.deepcopy it")
        return encoder

    prefix = attach(
        model, length, make, caller="attach_prefix", name=name, position=position,
        window=window, locations=locations, layers=layers, example=example,
        train_head=train_head,
    )  # fmt: skip
    encoder: Any = prefix.encoders[name]
    size = sum(p.numel() for p in encoder.parameters())
    base = sum(p.numel() for p in model.parameters()) - size
    if encoder.hidden is not None and size > base / 10:
        warnings.warn(
            f"attach_prefix: the MLP has {size:,} parameters, {size / base:.0%} of the base's "
            f"{base:,}; a smaller hidden, or a table (hidden=None), is usually enough",
            stacklevel=3,
        )
    return prefix
