"""Tensor parallelism: each process has a part of a linear layer with LoRA, dense or in 4 bits.

The two styles go where torch's own go, into `torch.distributed.tensor.parallel.parallelize_module`
or into `parallelize` here, which checks the whole plan first.  With W (out, in), A (rank, in),
B (out, rank), and x the input:

    ColwiseParallel     W and B cut by rows, A whole     each process computes its outputs
    RowwiseParallel     W and A cut by columns, B whole  each takes its inputs; outputs are summed

Parameters are DTensors on the mesh, `Shard` or `Replicate`, so `full_tensor()` gathers them.  While
the layer runs, its modules hold the local tensors and local sizes, put there by a hook before
`forward` and taken away by one after it, so that every kind of layer computes as it always does,
under checkpointing or under torch.compile (fullgraph).  Both at once, checkpointing inside compiled
code, is refused by torch: it takes what the hooks do for a side effect.
The gradient of a factor that is whole on each process is a sum over processes, taken in backward;
so is that of a ColwiseParallel input.  The outputs of RowwiseParallel are summed in their dtype,
and the bias is added by the first process alone.

This file imports torch.distributed.tensor, so `import minipeft` does not import it.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.placement_types import Placement

from minipeft.adapters.protocol import is_adapter
from minipeft.layers.dora import DoRALinear
from minipeft.lora import LoRALinear
from minipeft.prefix import PrefixEncoder
from minipeft.qlora import NF4Linear
from minipeft.quantized.conv1d import NF4Conv1D
from minipeft.quantized.cuts import COLUMNS, ROWS, stored_for_cuts

_SIZES = ("in_features", "out_features", "shape")
_OUTSIDE = "_minipeft_outside"  # in the __dict__ of a cut module while it runs: what it had before


class _Cut(NamedTuple):
    """How a style cuts: the axis of W (out, in), and where the parts of the rest are."""

    axis: int
    a: Placement
    b: Placement
    bias: Placement
    given: Placement  # the input that each process computes with
    made: Placement  # what each process computes


_COLWISE = _Cut(ROWS, Replicate(), Shard(0), Shard(0), Replicate(), Shard(-1))
_ROWWISE = _Cut(COLUMNS, Shard(1), Replicate(), Replicate(), Shard(-1), Partial())


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """Each process computes a part of the outputs: W and B are cut by rows, A is whole.

    Takes LoRALinear and DoRALinear, stacked too, over nn.Linear, NF4Linear or NF4Conv1D; these two
    without an adapter; and what torch's style takes (nn.Linear, nn.Embedding), which torch cuts.
    Keywords are torch's: `input_layouts` (default `Replicate()`), `output_layouts` (default
    `Shard(-1)`), `use_local_output` (default True: plain local tensors).

    Parameters become DTensors, so make the optimiser after this.  Codes are scattered from the
    mesh's first process, as all parameters are (`src_data_rank` of `parallelize_module`).  8-bit
    scales whose groups would be cut become float32 (quantized/cuts.py).  With dropout, each process
    draws the mask of its whole input from its own generator: with equal seeds the masks are equal
    and the layer computes as in one process; with others each part of the outputs has its own.

    Raises:
        TypeError: another kind of module.
        ValueError: on all processes, with nothing changed: sizes that the number of processes does
            not divide, a cut inside a block, a merged or trainable base, a module without values
            (meta) or already cut, processes whose layers or settings differ.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        agree(device_mesh, {"": (module, self)})
        return self.cut(module, device_mesh)

    def cut(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Cut a module that all processes have checked."""
        if isinstance(module, nn.Linear | nn.Embedding):
            return _by_torch(super()._apply, module, device_mesh)
        return _cut(self, _COLWISE, module, device_mesh)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """Each process computes a term of the outputs: W and A are cut by columns, B is whole.

    Takes what ColwiseParallel takes, but no DoRALinear: its lengths are norms of whole rows.
    Keywords are torch's: `input_layouts` (default `Shard(-1)`), `output_layouts` (default
    `Replicate()`), `use_local_output` (default True).  8-bit scales become float32: 0.373 bits a
    weight more in blocks of 64.  With dropout, each process draws the mask of its part of the
    input from its own generator: with equal seeds all parts have one mask, so give each process a
    seed of its own where masks must be independent.

    Raises:
        TypeError, ValueError: as ColwiseParallel.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        agree(device_mesh, {"": (module, self)})
        return self.cut(module, device_mesh)

    def cut(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Cut a module that all processes have checked."""
        if isinstance(module, nn.Linear | nn.Embedding):
            return _by_torch(super()._apply, module, device_mesh)
        return _cut(self, _ROWWISE, module, device_mesh)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Mapping[str, torch_parallel.ParallelStyle],
    *,
    src_data_rank: int | None = 0,
) -> list[str]:
    """torch's `parallelize_module`, after all processes have checked the whole plan.

    `plan` has styles by module names, in which `*` stands for any characters between two dots.
    Values are those of the mesh's process `src_data_rank`; None: each process takes its part of its
    own values, and nothing is sent.  Styles of other classes (torch's SequenceParallel) are applied
    unchecked.  Returns the names of the modules.

    The model can be copied (copy.deepcopy), and pickled by and for processes of this mesh; not if a
    plain nn.Linear or nn.Embedding was cut, on which torch puts functions that pickle refuses.

    Raises:
        TypeError: not a module, not a style, or a module that its style does not take.
        ValueError: on all processes, with nothing changed: a name that matches nothing, two styles
            for one module, a model with a prefix, or what a style refuses.
    """
    found: dict[str, tuple[nn.Module, torch_parallel.ParallelStyle]] = {}
    problem: Exception | None = None
    try:
        found = _matched(model, plan)
    except (TypeError, ValueError) as error:
        problem = error
    for _, style in found.values():
        style.src_data_rank = src_data_rank
    agree(mesh, found, problem)
    for module, style in found.values():
        if isinstance(style, ColwiseParallel | RowwiseParallel):
            style.cut(module, mesh)
        else:
            style._apply(module, mesh)
    return list(found)


def _matched(
    model: nn.Module, plan: Mapping[str, torch_parallel.ParallelStyle]
) -> dict[str, tuple[nn.Module, torch_parallel.ParallelStyle]]:
    """Modules and their styles by name, each module once."""
    if any(isinstance(module, PrefixEncoder) for module in model.modules()):
        raise ValueError(
            "parallelize: the model has a prefix, whose keys and values have all heads in each "
            "process; take it off first (its remove()), or shard the model by fully_shard instead"
        )
    found: dict[str, tuple[nn.Module, torch_parallel.ParallelStyle]] = {}
    taken: dict[int, str] = {}
    for pattern, style in plan.items():
        if not isinstance(style, torch_parallel.ParallelStyle):
            raise TypeError(f"{pattern!r}: expected a ParallelStyle, got {type(style).__name__}")
        modules = {n: m for n, m in model.named_modules() if _fits(n, pattern)}
        if not modules:
            raise ValueError(f"{pattern!r} matches no module; names are those of named_modules()")
        for name, module in modules.items():
            for layer in _stack(module):
                if id(layer) in taken:
                    raise ValueError(f"{pattern!r} and {taken[id(layer)]!r} both match {name!r}")
                taken[id(layer)] = pattern
            found[name] = (module, style)
    return found


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch, parts, wanted))


def agree(
    mesh: DeviceMesh,
    found: Mapping[str, tuple[nn.Module, torch_parallel.ParallelStyle]],
    problem: Exception | None = None,
) -> None:
    """Raise on every process if one of them has a problem, or if they have different layers.

    Raises:
        TypeError, ValueError: see the classes above.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"tensor parallel: a mesh of {mesh.ndim} dimensions; expected one (mesh['tp'])"
        )
    facts = [f"torch {torch.__version__}"]
    for name, (module, style) in found.items():
        if problem is None and isinstance(style, ColwiseParallel | RowwiseParallel):
            try:
                _check(module, style, mesh.size())
            except Exception as error:  # the others wait to hear of it
                kind = TypeError if isinstance(error, TypeError) else ValueError
                problem = kind(f"{name}: {error}" if name else str(error))
        tensors = [(n, tuple(p.shape), p.dtype) for n, p in module.named_parameters()]
        facts.append(f"{name} {style!r} {style.src_data_rank} {module!r} {tensors}")
    every: list[Any] = [None] * mesh.size()
    dist.all_gather_object(every, (facts, problem), group=mesh.get_group())
    for rank, (theirs, problem) in enumerate(every):
        if problem is not None:
            raise type(problem)(f"tensor parallel, process {rank} of {mesh.size()}: {problem}")
        if theirs != every[0][0]:
            pairs = zip(theirs, every[0][0], strict=False)
            one, other = next((p for p in pairs if p[0] != p[1]), (len(theirs), len(every[0][0])))
            raise ValueError(
                f"tensor parallel: process {rank} of {mesh.size()} has another model or plan than "
                f"process 0: {one}, and not {other}; make them equal on all processes"
            )


def _stack(module: nn.Module) -> list[nn.Module]:
    """The adapters over a layer from the outermost on, and the layer."""
    layers = [module]
    while type(layers[-1]) in (LoRALinear, DoRALinear):
        layers.append(cast(nn.Module, layers[-1].base))
    return layers


def _check(module: nn.Module, style: object, n: int) -> None:
    """Raise TypeError or ValueError unless this module can be cut for `n` processes."""
    caller, cut = type(style).__name__, _ROWWISE if isinstance(style, RowwiseParallel) else _COLWISE
    *adapters, plain = _stack(module)
    if isinstance(plain, nn.Embedding) and not adapters:
        return
    if type(plain) not in (NF4Linear, NF4Conv1D) and not (
        type(plain) is nn.Linear if adapters else isinstance(plain, nn.Linear)
    ):
        raise TypeError(
            f"{caller}: {type(plain).__name__}{' with an adapter' if adapters else ''}; expected "
            "nn.Linear, NF4Linear or NF4Conv1D, each alone or in LoRALinear or DoRALinear"
            + ("; take this adapter off (minipeft.remove)" if is_adapter(plain) else "")
        )
    if any(isinstance(layer, DoRALinear) for layer in adapters) and cut.axis == COLUMNS:
        raise TypeError(
            f"{caller}: DoRALinear has lengths that are norms of whole rows, which no process "
            "would have; use LoRA here, or ColwiseParallel"
        )
    sizes = (cast(int, plain.out_features), cast(int, plain.in_features))
    axis = ("out_features", "in_features")[cut.axis]
    stored = [p for layer in _stack(module) for p in layer._parameters.values() if p is not None]
    if any(isinstance(p, DTensor) for p in stored):
        raise ValueError(f"{caller}: {type(module).__name__} is sharded or cut already")
    if (adapters or isinstance(plain, NF4Linear)) and any(p.is_meta for p in stored):
        raise ValueError(f"{caller}: {type(module).__name__} is on the meta device; load it first")
    if sizes[cut.axis] % n:
        raise ValueError(
            f"{caller}: {type(module).__name__} {sizes} has {axis}={sizes[cut.axis]}, which {n} "
            f"processes do not divide; leave it out of the plan, or use another number"
        )
    if any(getattr(layer, "merged_module", None) is not None for layer in adapters):
        raise ValueError(f"{caller}: {type(module).__name__} is merged; minipeft.unmerge it first")
    own = plain.parameters() if adapters or isinstance(plain, NF4Linear) else ()
    if any(p.requires_grad for p in own):
        raise ValueError(f"{caller}: {type(plain).__name__} has trainable parameters; freeze it")
    if isinstance(plain, NF4Linear):
        stored_for_cuts(caller, plain, cut.axis, _places(sizes[cut.axis], n))


def _places(total: int, n: int) -> list[int]:
    return [total // n * part for part in range(n + 1)]


def _cut(style: Any, cut: _Cut, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Make DTensors of all parameters, then put them in, then hook the module."""

    def dtensor(value: Tensor, placement: Placement, trained: bool) -> nn.Parameter:
        made = distribute_tensor(
            value.detach().contiguous(), mesh, [placement], src_data_rank=style.src_data_rank
        )
        return nn.Parameter(made, requires_grad=trained)

    made: list[dict[str, nn.Parameter | None]] = []
    for layer in _stack(module):
        values: dict[str, Tensor] = {n: p for n, p in layer._parameters.items() if p is not None}
        trained = {name: value.requires_grad for name, value in values.items()}
        if isinstance(layer, NF4Linear):
            total = layer.shape[cut.axis]
            places = _places(total, mesh.size())
            values = stored_for_cuts(type(style).__name__, layer, cut.axis, places)
            values |= {} if layer.bias is None else {"bias": layer.bias}
        new: dict[str, nn.Parameter | None] = dict.fromkeys(layer._parameters.keys() & {"bias"})
        new |= {n: None for n, p in layer._parameters.items() if p is None}
        for name, value in values.items():
            new[name] = dtensor(value, _placement(cut, name, value), trained.get(name, False))
        made.append(new)
    for layer, new in zip(_stack(module), made, strict=True):
        layer._parameters.clear()
        layer._parameters.update(new)
    for layer in _stack(module):  # each, so that they work when adapters over them are taken off
        hooks = _Hooks(style, cut, mesh)
        layer.register_forward_pre_hook(hooks.enter, with_kwargs=True)
        layer.register_forward_hook(hooks.leave)
        # also after an exception, such as the one by which checkpointing ends a recomputation early
        layer.register_forward_hook(hooks.put_back, always_call=True)
    return module


def _placement(cut: _Cut, name: str, value: Tensor) -> Placement:
    """Where the parts of a parameter are."""
    if name in ("absmax_offset", "codebook_bytes"):
        return Replicate()
    known = {"lora_a": cut.a, "lora_a0": cut.a, "lora_b": cut.b, "lora_b0": cut.b}
    known |= {"bias": cut.bias, "magnitude": Shard(0)}
    return known.get(name) or Shard(cut.axis if value.dim() > 1 else 0)


class _Hooks:
    """Let a module run on local tensors; no module is held, so copies and pickles of one work."""

    def __init__(self, style: Any, cut: _Cut, mesh: DeviceMesh) -> None:
        self.style, self.cut, self.mesh = style, cut, mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hooks":
        return self  # nothing in it changes, and the processes are the same

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before forward: put the local tensors and sizes in."""
        style, cut, mesh = self.style, self.cut, self.mesh
        if not args:
            raise TypeError(f"{type(style).__name__}: give the input by position")
        self.put_back(module)  # after a forward that was interrupted
        stored = [p for layer in _stack(module) for p in layer._parameters.values()]
        if not any(isinstance(p, DTensor) for p in stored):
            return None  # an adapter over this layer has entered already
        if any(getattr(layer, "merged_module", None) is not None for layer in _stack(module)):
            raise RuntimeError(f"{type(style).__name__}: merged after it was cut; unmerge it first")
        x = args[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, style.input_layouts, run_check=False)
        x = _local(x.redistribute(placements=[cut.given]))
        outside: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        vars(module)[_OUTSIDE] = outside
        for layer in _stack(module):
            sizes = {name: vars(layer)[name] for name in _SIZES if name in vars(layer)}
            outside.append((layer, sizes, dict(layer._parameters)))
            for name, p in layer._parameters.items():
                skipped = name == "bias" and cut.axis == COLUMNS and mesh.get_local_rank() > 0
                if isinstance(p, DTensor):
                    layer._parameters[name] = None if skipped else _local(p)
            vars(layer).update(_local_sizes(cut.axis, sizes, mesh.size()))
        return (x, *args[1:]), kwargs

    def put_back(self, module: nn.Module, *_: Any) -> None:
        """After forward: the DTensors and the sizes of the whole layer."""
        for layer, sizes, parameters in vars(module).pop(_OUTSIDE, ()):
            layer._parameters.update(parameters)
            vars(layer).update(sizes)

    def leave(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """After forward: the output as the style wants it."""
        if _OUTSIDE not in vars(module):
            return out
        made = DTensor.from_local(out, self.mesh, [self.cut.made], run_check=False)
        made = made.redistribute(placements=self.style.output_layouts)
        return made.to_local() if self.style.use_local_output else made


def _by_torch(
    apply: Callable[[nn.Module, DeviceMesh], nn.Module], module: nn.Module, mesh: DeviceMesh
) -> nn.Module:
    """What torch's own style makes of a module; its hooks say why they cannot be pickled."""
    kinds: list[Any] = [module._forward_pre_hooks, module._forward_hooks]
    before = [set(hooks) for hooks in kinds]
    module = apply(module, mesh)
    for hooks, old in zip(kinds, before, strict=True):
        for key in hooks.keys() - old:
            hooks[key] = _OfTorch(hooks[key], type(module).__name__)
    return module


class _OfTorch:
    """A hook that torch made, a lambda."""

    def __init__(self, hook: Callable[..., Any], kind: str) -> None:
        self.hook, self.kind = hook, kind

    def __call__(self, *given: Any) -> Any:
        return self.hook(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OfTorch":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"parallelize: torch cut a plain {self.kind} of this model, with functions that cannot "
            "be pickled; save the adapter (save_peft) or the state dict, and cut a new model"
        )


def _local(whole: DTensor) -> Tensor:
    """This process's part; what is whole on each gets its gradient summed over all."""
    if whole.requires_grad and whole.placements[0].is_replicate():
        kept = whole.redistribute(placements=whole.placements)  # backward: from the sum's terms
        return kept.to_local(grad_placements=[Partial()])
    return whole.to_local()


def _local_sizes(axis: int, sizes: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Sizes of one part of a layer with these."""
    name = ("out_features", "in_features")[axis]
    local = {name: sizes[name] // n} if name in sizes else {}
    if "shape" in sizes:
        shape = list(sizes["shape"])
        shape[axis] //= n
        local["shape"] = tuple(shape)
    return local
