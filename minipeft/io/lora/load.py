"""Reads LoRA files of other programs: they become what PEFT's would hold, and are loaded so."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.adapters.names import DEFAULT
from minipeft.io.fields import read_object
from minipeft.io.files import read_all
from minipeft.io.llama_names import is_rotated
from minipeft.io.lora.branches import Branch, Pairs, Slices, branch_of
from minipeft.io.lora.places import Place, Places
from minipeft.io.lora.scale import Scales
from minipeft.io.lora_keys import PROGRAMS, parse
from minipeft.io.peft.config import CONFIG_NAME
from minipeft.io.peft.folder import read_weights
from minipeft.io.peft.keys import PREFIX
from minipeft.io.peft.load import Loaded, check_ready, put
from minipeft.io.peft.save import target_modules
from minipeft.io.pickled import SUFFIXES, view_model
from minipeft.io.rotary import ORDERS, halves_from_pairs, head_dim_of
from minipeft.model.peft_words import in_our_words

_MLX_NAME = "adapters.safetensors"
_CHANGING = (".dora_scale", ".lora_mid.weight")  # they change what the factors mean


@in_our_words
def load_lora(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    part: str | None = None,
    alpha: float | None = None,
    rotary_rows: str | None = None,
    slices: Slices | None = None,
    enable_lora: Sequence[bool] | None = None,
    whole: Sequence[str] = (),
    name: str = DEFAULT,
    strict: bool = True,
) -> Loaded:
    """Inject and load LoRA from a file of kohya, diffusers, torchtune, MLX, loralib, SAT, ...

    lora_keys.py lists the keys that are known, places.py how names are tried on the model at hand,
    scale.py where alpha stands.  `source` is a file, a directory of MLX or of PEFT's form
    (FlagAI's), or tensors by name.  All options are for what such a file does not say:

    part            of a file with adapters of several models (unet, lora_te, llama_model): this
    alpha           the scaling is alpha / rank; where the file says it, the option is refused
    rotary_rows     "pairs" where rows of queries and keys are in Meta's order, "halves" where they
                    are in Hugging Face's (rotary.py).  Names of Meta's mean pairs; names of
                    torchtune's need an answer (Llama, Mistral, Gemma: pairs; Qwen2, Phi-3: halves)
    slices          rows of the parts of a fused projection with several pairs (SAT), by the end of
                    its name: {"query_key_value": per_head(32, 128)} for VisualGLM
    enable_lora     of a loralib MergedLinear that has not all its parts enabled
    whole           modules that were trained whole, whose tensors are in the file (llama_proj)

    As load_peft it freezes the rest, and returns the names of the modules.  What the file holds
    beyond `part`, and with strict=False tensors that are no factors, is in `.unexpected`.

    Raises:
        ValueError: a file missing or damaged, a pickle of more than tensors, keys that no program
            of the table has, factors that are missing or do not fit the model, an option missing
            or refused.  The model is then as it was.
    """
    check_ready(model, name)
    if rotary_rows not in (None, *ORDERS):
        raise ValueError(f"load_lora: rotary_rows={rotary_rows!r:.40}; expected one of {ORDERS}")
    tensors, config, metadata, where = _read(source)
    places = Places(model)
    modules, rest = _sorted(tensors, where)
    placed, elsewhere = _placed(modules, places, part, where)
    scales, options = Scales(str(where), config, metadata, alpha), (slices or {}, enable_lora)
    branches: dict[str, Branch] = {}
    for module, place in placed:
        if place.name in branches:
            raise ValueError(f"{where}: {module.spelled:.80} comes twice; it is {place.name}")
        branches[place.name] = branch = branch_of(
            module, place, places.modules[place.name], scales, f"{where}: {module.spelled:.80}",
            *options,
        )  # fmt: skip
        if module.program == "SAT" and branch.slices is not None:
            _check_heads(model, branch, f"{where}: {module.spelled:.80}")
        if _in_pairs(place, rotary_rows, module, where):
            dim = head_dim_of(model, place.name)
            for role in ("lora_B.weight", "lora_magnitude_vector"):
                if role in branch.tensors:
                    branch.tensors[role] = halves_from_pairs(branch.tensors[role], dim)
    scales.check_magnitudes("lora_magnitude_vector" in b.tensors for b in branches.values())
    saved, rest = _whole(tensors, rest, whole, where)
    if changing := [key for key in rest if key.endswith(_CHANGING)]:
        raise ValueError(
            f"{where}: {changing[0]!r:.80} ({len(changing)} in all) belongs to LyCORIS's form of "
            "DoRA or LoCon, which is not read: without it the factors compute something else"
        )
    if rest and strict:
        raise ValueError(
            f"{where}: {rest[0]!r:.80} ({len(rest)} in all) is no factor of LoRA; whole= names "
            "modules that were trained whole, strict=False passes over the others"
        )
    content, named, training = _peft_form(model, branches, saved)
    loaded = put(model, content, named, training, where, name=name, strict=True, level=4)
    loaded.unexpected += [*rest, *elsewhere]
    return loaded


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, object], dict[str, str], Path]:
    """Tensors, the configuration beside them, the file's metadata, and where they are from."""
    if isinstance(source, Mapping):
        return dict(source), {}, {}, Path("the tensors")
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    config = read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    if path.is_dir() and (path / _MLX_NAME).is_file():
        path /= _MLX_NAME
    elif path.is_dir():
        return read_weights(path, config)[0], config, {}, path
    if path.suffix in SUFFIXES:
        return view_model(path), config, {}, path
    tensors, metadata = read_all(path)
    return tensors, config, metadata, path


def _sorted(tensors: Mapping[str, Tensor], where: Path) -> tuple[dict[str, Pairs], list[str]]:
    """The factors by module, and the names of what is none."""
    modules: dict[str, Pairs] = {}
    rest: list[str] = []
    for key, value in tensors.items():
        found = parse(key)
        if found is None:
            rest.append(key)
            continue
        own = modules.setdefault(found.module, Pairs(found.module))
        if found.program and own.program not in ("", found.program):
            raise ValueError(f"{where}: {key:.80} is of {found.program}, beside {own.program}")
        own.program = own.program or found.program
        if (found.role, found.part) in own.roles:
            raise ValueError(f"{where}: {key:.80} comes twice")
        own.roles[found.role, found.part] = value
    for module, own in list(modules.items()):
        if not own.program:  # an alpha of something else
            rest += [key for key in tensors if (said := parse(key)) and said.module == module]
            del modules[module]
    if not modules:
        raise ValueError(
            f"{where}: no factors of LoRA by the keys of {', '.join(PROGRAMS)}; it has "
            f"{[key[:60] for key in tensors][:4]}"
        )
    return modules, rest


def _placed(
    modules: Mapping[str, Pairs], places: Places, part: str | None, where: Path
) -> tuple[list[tuple[Pairs, Place]], list[str]]:
    """The modules of one part with their places, and the names of the others.

    Raises:
        ValueError: a name that no module has, or several parts of which none was asked for.
    """
    found: list[tuple[Pairs, Place]] = []
    lost: list[Pairs] = []
    elsewhere: list[str] = []
    for own in modules.values():
        if part is not None and not re.match(rf"{re.escape(part)}[._]", own.spelled):
            elsewhere.append(own.spelled)
            continue
        place = places.find(own.spelled, own.program)
        if place is None:
            lost.append(own)
        else:
            found.append((own, place))
    counts = Counter(place.part for _, place in found)
    counts.update(places.part_of(own.spelled, own.program) for own in lost)
    if (part is None and len({place.part for _, place in found}) > 1) or (lost and found):
        some = ", ".join(f"{name or '(none)'}: {n}" for name, n in counts.most_common(6))
        hint = f"; it has modules of several parts ({some}): part= chooses one"
    else:
        hint = ""
    if lost:
        raise ValueError(
            f"{where}: {lost[0].spelled:.80} ({len(lost)} of {len(modules)}; keys of "
            f"{lost[0].program}) is no module of the model, as it is, or by the names of "
            f"diffusers, kohya, Meta and torchtune; it has for example "
            f"{next(reversed(places.modules), '')!r}{hint}"
        )
    if hint or not found:
        raise ValueError(f"{where}: nothing is of part {part!r}" if not found else f"{where}{hint}")
    return found, elsewhere


def _in_pairs(place: Place, rotary_rows: str | None, own: Pairs, where: Path) -> bool:
    """Whether the rows of a projection are to be reordered.

    Raises:
        ValueError: nobody knows.
    """
    if not is_rotated(place.name):
        return False
    if place.naming == "torchtune" and rotary_rows is None:
        raise ValueError(
            f"{where}: {own.spelled:.80} is torchtune's, whose rotary rows are in one order for "
            "some models and in another for others; pass rotary_rows='pairs' (Llama, Mistral, "
            "Gemma) or 'halves' (Qwen2, Phi-3)"
        )
    return rotary_rows == "pairs" or (rotary_rows is None and place.naming == "Meta")


def _check_heads(model: nn.Module, branch: Branch, where: str) -> None:
    """Raise ValueError if slices go by another number of heads than the model's configuration.

    Slices of 16 heads of 256 rows have the sizes of 32 heads of 128, and mean other rows.
    """
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    found = {len(part[3]) for part in branch.slices or ()}  # type: ignore[arg-type]
    if isinstance(heads, int) and not found <= {1, heads}:
        raise ValueError(
            f"{where}: the slices go by {max(found)} heads; the model's configuration has {heads}"
        )


def _whole(
    tensors: Mapping[str, Tensor], rest: list[str], whole: Sequence[str], where: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of modules that were trained whole, and the names of the others."""
    saved: dict[str, Tensor] = {}
    for name in whole:
        keys = [key for key in rest if f"{key}.".startswith(f"{name}.")]
        if not keys:
            raise ValueError(f"{where}: whole names {name!r:.80}, and the file has no {name}.*")
        saved |= {key: tensors[key] for key in keys}
    return saved, [key for key in rest if key not in saved]


def _peft_form(
    model: nn.Module, branches: Mapping[str, Branch], saved: Mapping[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor], dict[str, Any]]:
    """Configuration, tensors and slices of a directory of PEFT's with these branches."""
    first = next(iter(branches.values()))
    ranks = {f"^{re.escape(n)}$": b.rank for n, b in branches.items() if b.rank != first.rank}
    alphas = {f"^{re.escape(n)}$": b.alpha for n, b in branches.items() if b.alpha != first.alpha}
    content: dict[str, object] = {
        "peft_type": "LORA", "r": first.rank, "lora_alpha": first.alpha,
        "target_modules": target_modules(model, set(branches)),
        "rank_pattern": ranks, "alpha_pattern": alphas,
        "use_dora": any("lora_magnitude_vector" in b.tensors for b in branches.values()),
        "modules_to_save": sorted({key.rpartition(".")[0] for key in saved}) or None,
    }  # fmt: skip
    named = {
        f"{PREFIX}{place}.{role}": value
        for place, branch in branches.items() for role, value in branch.tensors.items()
    }  # fmt: skip
    named |= {f"{PREFIX}{key}": value for key, value in saved.items()}
    layers = {n: {"slices": b.slices} for n, b in branches.items() if b.slices is not None}
    return content, named, {"layers": layers} if layers else {}
