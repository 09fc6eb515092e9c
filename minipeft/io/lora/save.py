"""Writes LoRA under Meta's names of LLaMA, with the rows of queries and keys in Meta's order."""

import os
from pathlib import Path

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.adapters.sharded import refuse_shards
from minipeft.io.llama_names import META, is_rotated, renamed
from minipeft.io.peft.config import CONFIG_NAME, WEIGHTS_NAME
from minipeft.io.peft.keys import PREFIX, parse
from minipeft.io.peft.save import describe
from minipeft.io.replace import Replacement
from minipeft.io.rotary import head_dim_of, pairs_from_halves
from minipeft.io.seal import stage

_META_NAMES = {own: meta for meta, own in META.items()}
_OUTPUT = ("lora_B", "lora_magnitude_vector", "lora_bias")  # with a row for each output


def save_meta_lora(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = DEFAULT
) -> list[str]:
    """Write LoRA on Hugging Face's LLaMA as a PEFT directory for Meta's code (FlagAI's Aquila).

    Modules are called layers.0.attention.wq, ..., and the rows of B are in pairs there (see
    rotary.py).  load_lora reads it; load_peft refuses its names.  Returns them.

    Raises:
        ValueError: adapters of other modules than the projections of LLaMA, slices, or what
            save_peft refuses.  Nothing is written then.
        OSError: the disk is full, and the like.
    """
    refuse_shards("save_meta_lora", model, "save_peft writes them; load that in one process")
    own = describe(model, [name])[name]
    names = {place: renamed(place, _META_NAMES) for place in own.modules}
    wrong = [place for place, meta in names.items() if meta is None]
    wrong += [place for place, said in own.training.get("layers", {}).items() if "slices" in said]  # type: ignore[attr-defined]
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if own.config[key]]
    if wrong or patterns:
        raise ValueError(
            f"save_meta_lora: {(wrong or patterns)[0]}; expected one rank and alpha, on the "
            "projections of LLaMA by Hugging Face's names (model.layers.0.self_attn.q_proj)"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in own.tensors.items():
        said = parse(key.removeprefix(PREFIX))
        meta = names[said.module]
        if said.role in _OUTPUT and is_rotated(said.module):
            dim = head_dim_of(model, said.module)
            value = pairs_from_halves(value.detach().cpu(), dim)
        tensors[key.replace(f"{PREFIX}{said.module}.", f"{PREFIX}{meta}.")] = value
    targets = sorted({str(meta).rpartition(".")[2] for meta in names.values()})
    with Replacement(Path(path)) as unit:
        stage(unit, (CONFIG_NAME, WEIGHTS_NAME), {**own.config, "target_modules": targets}, tensors)
    return [str(meta) for meta in names.values()]
