"""Loads a PEFT directory onto a model; all layers are made and filled before any is put in."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT, check_new_name, give_name, named
from minipeft.adapters.plain_names import Spellings
from minipeft.adapters.protocol import innermost, is_packed
from minipeft.adapters.ready import check_model
from minipeft.adapters.sharded import resharded
from minipeft.adapters.state import named_adapters, refuse_merged
from minipeft.adapters.targets import Names, visible_modules
from minipeft.inject import freeze, restoring, swap_shared
from minipeft.io.fields import is_off, read_config
from minipeft.io.peft.build import Builder, new_layers
from minipeft.io.peft.config import CONFIG_NAME, OTHER_READER, PROMPT_KINDS, checked
from minipeft.io.peft.contents import sort_out
from minipeft.io.peft.folder import read_weights, weights_file
from minipeft.io.peft.into_shards import load_into_shards
from minipeft.io.peft.located import Located, locate
from minipeft.io.peft.matched import matched
from minipeft.io.peft.merged import from_peft_02
from minipeft.io.peft.new_rows import check_heads, settle
from minipeft.io.peft.prompts import load_prompts
from minipeft.io.peft.training import Training, parsed
from minipeft.io.replace import read_whole
from minipeft.model.peft_words import in_our_words
from minipeft.model.rows import refuse_rows


class Loaded(Names):
    """Names of the modules that got a layer.

    With strict=False `missing` and `unexpected` hold the keys that the file lacked or had beyond
    those asked for; `ignored` are the configuration's fields that were read past.
    """

    def __init__(
        self, names: list[str], missing: list[str], unexpected: list[str],
        ignored: dict[str, object],
    ) -> None:  # fmt: skip
        super().__init__(names)
        self.missing, self.unexpected, self.ignored = missing, unexpected, ignored


@in_our_words
def load_peft(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = DEFAULT, strict: bool = True
) -> Loaded:
    """Inject and load the adapter that PEFT or minipeft saved in directory `path`; trainable.

    LoRA and DoRA on linear layers, embeddings, convolutions, attention and expert weights; trained
    biases, modules saved whole, trained tokens (rows that extend_vocabulary made go behind the
    table, or into one of the new size); on transformers models prefix tuning, cartridges, prompt
    tuning and P-tuning with their heads.  Every key must belong to a module of the model,
    with or without PEFT's "base_model.model." before it, and every module that the configuration
    targets must have its keys.  Values take the dtype of the layers, float32.  With a `name` it is
    one more adapter, over those that are there.  Freezes every parameter that no adapter owns.
    Names may hold what torch wraps around modules, in the file or in the model, and may be those
    that modules of transformers had before its version 5.  Returns the names;
    with `strict=False` what is missing or unexpected is in the result's `.missing` and
    `.unexpected`, and the rest is loaded; `.ignored` has the configuration's fields of other
    trainers that were read past, and with `strict=False` those that nobody here knows.

    Into a model that fully_shard has cut no layer can be put.  Where it has the layers of an
    adapter called `name` already, LoRA or DoRA of the file's ranks and scalings, they get the
    file's values: every process calls this, reads the file and takes its part.

    Raises:
        ValueError: a file missing or damaged, another kind of adapter, a key missing, extra or of
            another shape, NaN or Inf, an adapter of another model.  The model is then as it was.
    """
    directory = Path(path)
    if resharded(model) is not None and name in named(model):
        return Loaded(load_into_shards(model, directory, name, strict=strict), [], [], {})
    return read_whole(directory, lambda: _load(model, directory, name, strict=strict))


def _load(model: nn.Module, directory: Path, name: str, *, strict: bool) -> Loaded:
    check_ready(model, name)
    if directory.is_file():
        raise ValueError(
            f"{directory}: is a file; load_peft reads directories that PEFT or save_peft wrote; "
            f"{OTHER_READER} reads single files of other programs"
        )
    content = read_config(directory / CONFIG_NAME, "PEFT or save_peft", "prefix_config.json",
                          "load_prefix")  # fmt: skip
    if content.get("peft_type") in PROMPT_KINDS:
        names, unexpected = load_prompts(model, directory, content, name, strict=strict)
        return Loaded(names, [], unexpected, {})
    where = weights_file(directory)
    if is_off(content.get("enable_lora")):
        checked(content, strict=strict)
        tensors, training = read_weights(directory, content)
    else:  # PEFT 0.2
        tensors, _ = read_weights(directory, content)
        content, tensors, training = from_peft_02(content, tensors, str(where))
    return put(model, content, tensors, training, where, name=name, strict=strict)


def check_ready(model: nn.Module, name: str) -> None:
    """Raise ValueError unless an adapter of this name can be loaded onto the model."""
    check_model("load_peft", model)
    if name != DEFAULT:
        check_new_name("load_peft", model, name)
    refuse_merged("load_peft", named_adapters(model))
    refuse_rows("load_peft", model)


def put(
    model: nn.Module, content: dict[str, object], tensors: dict[str, Tensor],
    training: Mapping[str, Any], where: Path, *, name: str, strict: bool, level: int = 7,
) -> Loaded:  # fmt: skip
    """Inject an adapter that was read: a configuration, tensors, and what training.py says.

    After check_ready.  `where`: the file that errors name; `level`: how far above this the user's
    line is, for warnings.

    Raises:
        ValueError: as load_peft; the model is then as it was.
    """
    plain = checked(content, strict=strict)
    found = locate(model, tensors, str(where))
    config = matched(plain, found, CONFIG_NAME)
    if strict and (unused := config.unused_patterns()):
        raise ValueError(f"{CONFIG_NAME}: the patterns {unused} fit no module of the model")
    training_of = parsed(training, str(where))
    contents = sort_out(where, tensors, model, config, found, training_of)
    if strict and (wrong := contents.complaint()):
        raise ValueError(f"{where}: {wrong}")
    _say_dense(found, training_of, level)
    with restoring(model):
        built = Builder(
            model, found, config, contents, where, name=name, strict=strict, training=training_of
        ).build()
        if not built:
            raise ValueError(f"{where}: holds no adapter")
        modules = visible_modules(model)
        made = {found.real[place]: layer for place, layer in built.items()}
        check_heads(model, made, str(where))
        swap_shared(model, made)
        give_name(name, new_layers(made, modules))
        freeze(model)
        settle(model, made, modules)
    order = {name: number for number, name in enumerate(modules)}
    names = sorted(made, key=lambda name: order.get(name, len(order)))
    return Loaded(names, contents.missing, contents.unexpected, plain.ignored)


def _say_dense(found: Located, training: Mapping[str, Training], level: int) -> None:
    """Warn where modules whose bases were 4-bit when the adapter was saved are dense here."""
    here: dict[str, Any] = {**found.modules, **found.experts}
    places = Spellings(here)
    four_bit = [places.find(name) for name, own in training.items() if own.four_bit]
    dense = [n for n in four_bit if n is not None and not is_packed(innermost(here[n]))]
    if dense:
        warnings.warn(
            f"load_peft: the adapter was saved over 4-bit layers, and {dense[0]} ({len(dense)} in "
            "all) is dense here, so outputs differ by what rounding to 4 bits changes; to have "
            "those 4-bit layers, call quantize_model or load_quantized before load_peft",
            stacklevel=level + 1,
        )
