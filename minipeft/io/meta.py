"""Meta's checkpoints of LLaMA: params.json and consolidated.00.pth, consolidated.01.pth, ...

Each file is one of n model-parallel processes: it has every name, and of most tensors a piece.

    cut by rows       wq wk wv w1 w3 output (Llama 3: tok_embeddings)
    cut by columns    wo w2 tok_embeddings
    whole in each     norms; rope.freqs, which is computed and not read

The axis follows from the shapes: it is the one along which the pieces make the model's tensor.
Names are in llama_names.py, the order of rows of wq and wk in rotary.py.
Source: meta-llama/llama, llama/model.py.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapters.state import named_adapters
from minipeft.io.fields import read_object
from minipeft.io.files import check_values
from minipeft.io.header import Spec
from minipeft.io.llama_names import META, is_rotated, renamed
from minipeft.io.rotary import halves_from_pairs, head_dim_of, pairs_from_halves
from minipeft.io.shards import Reader
from minipeft.io.unfinished import working_for

_COMPUTED = "rope.freqs"
_META_NAMES = {own: meta for meta, own in META.items()}
_BY_COLUMNS = ("wo", "w2", "tok_embeddings")
_RECORD = "saving.json"
_SCALED = {  # of Meta's code for use_scaled_rope; params.json has no words for others
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_NEAR = 1e-12  # two spellings of one number in JSON


def load_meta(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Fill a transformers LlamaForCausalLM with Meta's checkpoint; returns the parameters' names.

    The model has its sizes and its memory already: LlamaForCausalLM(LlamaConfig(...)).  Files are
    mapped and read twice, tensor by tensor: all are checked, then copied in the parameters' dtype.
    consolidated.*.safetensors are read too (Mistral's).

    Raises:
        ValueError: no files, one missing or cut short, a name that is missing or unknown, another
            shape, dtype or size of model, numbers of params.json that are not the configuration's;
            values that are not finite; a model with adapters, or on the meta device.  The model is
            as it was, unless somebody changes the files meanwhile.
    """
    directory = Path(folder)
    _check_plain("load_meta", model)
    paths = _paths(directory)
    _check_params(model, directory)
    targets = _targets(model)
    with ExitStack() as files:
        readers = [files.enter_context(Reader([path])) for path in paths]
        axes = _axes(readers, paths, targets)
        seen: dict[int, str] = {}
        for copying in (False, True):
            for name in axes:
                value = _whole(model, readers, axes, name)
                own = targets[name]
                if copying:
                    own.copy_(value)  # detached
                    continue
                check_values(directory, {name: value}, {name: own})
                first = seen.setdefault(own.data_ptr(), name)
                if first != name and not torch.equal(value, _whole(model, readers, axes, first)):
                    raise ValueError(
                        f"{directory}: {first} and {name} differ, and are tied in the model; build "
                        "it with tie_word_embeddings=False"
                    )
    return [f"{_place(name)}.weight" for name in axes]


def save_meta(model: nn.Module, folder: str | os.PathLike[str], *, shards: int = 1) -> list[str]:
    """Write a transformers LlamaForCausalLM as Meta's checkpoint; returns the files' names.

    `shards` cuts it for as many processes, in the layout of LLaMA 1 and 2.  The files are pickles
    of plain tensors, which is what Meta's code reads.

    Raises:
        ValueError: a model with adapters or other parameters than LLaMA's, heads or rotary
            positions that params.json cannot say; sizes that `shards` does not divide; a folder
            that exists.  Nothing is written then.
        OSError: the disk is full, and the like.
    """
    directory = Path(folder).absolute()
    _check_plain("save_meta", model)
    if directory.exists():
        raise ValueError(f"{directory}: exists already; choose another directory")
    targets = _targets(model)
    for name, value in targets.items():
        axis = _axis_to_cut(name)
        if axis is not None and (shards < 1 or value.shape[axis] % shards):
            raise ValueError(
                f"save_meta: shards={shards} does not divide {name} {tuple(value.shape)}"
            )
    params = _params(model)
    _check_said(model)
    made = [f"consolidated.{number:02d}.pth" for number in range(shards)]
    with working_for(directory, _RECORD, {"shards": shards}) as unfinished:
        for number, file in enumerate(made):
            pieces = {n: _piece(model, n, v, number, shards) for n, v in targets.items()}
            torch.save(pieces, unfinished / file)
        (unfinished / "params.json").write_text(json.dumps(params))
    return made


def _check_plain(caller: str, model: nn.Module) -> None:
    if adapters := named_adapters(model):
        raise ValueError(
            f"{caller}: the model has adapters ({next(iter(adapters))}); take them off first: "
            "minipeft.remove(model), with merge=True to keep what they learned"
        )
    if place := next((n for n, p in model.named_parameters() if p.is_meta), None):
        raise ValueError(f"{caller}: {place} is on the meta device; give the model its memory")


def _paths(directory: Path) -> list[Path]:
    """The files of the checkpoint in the order of the processes."""
    if directory.is_file():
        raise ValueError(f"{directory}: is a file; pass the folder that it is in")
    for suffix in ("pth", "safetensors"):
        paths = sorted(directory.glob(f"consolidated*.{suffix}"))
        if paths and [p.name for p in paths] == [f"consolidated.{suffix}"]:
            return paths
        expected = [f"consolidated.{number:02d}.{suffix}" for number in range(len(paths))]
        if lost := [name for name in expected if not (directory / name).is_file()]:
            raise ValueError(
                f"{directory / lost[0]}: no such file, beside {paths[-1].name}; get it"
            )
        if paths:
            return paths
    raise ValueError(f"{directory}: no consolidated.00.pth; expected a folder of Meta's checkpoint")


def _params(model: nn.Module) -> dict[str, object]:
    """params.json of a model, from its configuration."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
    if kind not in ("default", "llama3"):
        raise ValueError(f"rotary positions of type {kind!r} are not Meta's")
    dim, hidden = config.hidden_size, config.intermediate_size
    return {
        "dim": dim, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps, "rope_theta": theta, "use_scaled_rope": kind == "llama3",
        # Meta's code takes two thirds of 4 dim, times this, up to a multiple of multiple_of
        "multiple_of": 1, "ffn_dim_multiplier": (hidden + 0.5) / int(8 * dim / 3),
    }  # fmt: skip


def _check_said(model: nn.Module) -> None:
    """Raise ValueError where Meta's code would compute something else by params.json."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    own = {key: rope.get(key) for key in _SCALED}
    if rope.get("rope_type") == "llama3" and own != _SCALED:
        raise ValueError(
            f"save_meta: rotary positions with {own}; expected {_SCALED}, which Meta's code has"
        )
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if dim * heads != config.hidden_size:
        raise ValueError(
            f"save_meta: {heads} heads of {dim} numbers; Meta's code makes heads of "
            f"hidden_size / heads = {config.hidden_size} / {heads}"
        )


def _check_params(model: nn.Module, directory: Path) -> None:
    """Raise ValueError where params.json says another number than the model's configuration."""
    path = directory / "params.json"
    found, own = read_object(path), _params(model)
    found = {"n_kv_heads": found.get("n_heads"), "rope_theta": 10000.0, "use_scaled_rope": False,
             **found}  # fmt: skip
    # the sizes of the vocabulary and of the hidden layer are the tensors': LLaMA 1 writes -1
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta",
                "use_scaled_rope"):  # fmt: skip
        said, expected = found.get(key), own[key]
        same = type(said) in (int, float, bool) and (
            abs(float(said) - float(expected)) <= _NEAR * abs(float(expected))  # type: ignore[arg-type]
        )
        if not same:
            raise ValueError(
                f"{path}: {key} is {said!r:.40}; the model's configuration has {expected}; build "
                "the model of this checkpoint"
            )


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by Meta's names."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place, _, kind = name.rpartition(".")
        meta = renamed(place, _META_NAMES)
        if meta is None or kind != "weight":
            raise ValueError(
                f"{type(model).__name__} has {name}, which Meta's LLaMA has not; expected the "
                "parameters of transformers' LlamaForCausalLM, without biases"
            )
        found[f"{meta}.weight"] = parameter.detach()
    return found


def _axes(
    readers: list[Reader], paths: list[Path], targets: Mapping[str, Tensor]
) -> dict[str, int | None]:
    """For each name the axis along which its pieces are joined; None: each file has it whole."""
    axes: dict[str, int | None] = {}
    for reader, path in zip(readers, paths, strict=True):
        names = reader.specs.keys() - {_COMPUTED}
        if wrong := sorted(names ^ targets.keys()):
            how = "unknown" if wrong[0] in names else "missing"
            raise ValueError(f"{path}: {wrong[0]:.80} is {how} ({len(wrong)} such names); expected "
                             f"the {len(targets)} of this model")  # fmt: skip
    for name, own in targets.items():
        pieces = [reader.specs[name] for reader in readers]
        axes[name] = _axis(name, pieces, tuple(own.shape), paths)
    return axes


def _axis(name: str, pieces: list[Spec], whole: tuple[int, ...], paths: list[Path]) -> int | None:
    (dtype, shape), n = pieces[0], len(pieces)
    for spec, path in zip(pieces, paths, strict=True):
        if spec != (dtype, shape):
            raise ValueError(f"{path}: {name} is {spec}; {paths[0].name} has {(dtype, shape)}")
    if shape == whole:
        return None
    for axis in range(len(shape)):
        if (*shape[:axis], n * shape[axis], *shape[axis + 1 :]) == whole:
            return axis
    raise ValueError(
        f"{paths[0]}: {name} is {shape} in each of {n} files; the model's has {whole}: the files "
        "are of another size of model, or some of them are missing"
    )


def _whole(
    model: nn.Module, readers: list[Reader], axes: Mapping[str, int | None], name: str
) -> Tensor:
    """One tensor as the model has it."""
    pieces, axis = [reader.view(name) for reader in readers], axes[name]
    if axis is None and any(not torch.equal(pieces[0], other) for other in pieces[1:]):
        file = readers[0].file_of[name]
        raise ValueError(f"{file}: {name} is not the same in the other files")
    value = pieces[0] if axis is None else torch.cat(pieces, axis)
    place = _place(name)
    return halves_from_pairs(value, head_dim_of(model, place)) if is_rotated(place) else value


def _place(name: str) -> str:
    """Hugging Face's name of the module that has a tensor."""
    return str(renamed(name.removesuffix(".weight"), META))


def _axis_to_cut(name: str) -> int | None:
    own = name.removesuffix(".weight").rpartition(".")[2]
    return None if own.endswith("norm") else int(own in _BY_COLUMNS)


def _piece(model: nn.Module, name: str, value: Tensor, number: int, shards: int) -> Tensor:
    place = _place(name)
    if is_rotated(place):
        value = pairs_from_halves(value, head_dim_of(model, place))
    axis = _axis_to_cut(name)
    piece = value if axis is None else value.chunk(shards, axis)[number]
    return piece.detach().cpu().contiguous().clone()
