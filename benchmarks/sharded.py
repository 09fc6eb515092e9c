"""Functions of the library on models in several processes: `python -m benchmarks.sharded`.

Each function runs on a model that fully_shard has cut (FSDP2), in DistributedDataParallel (DDP), or
cut layer by layer (TP, tensor parallelism), and on its twin in the same process, which is whole.
"right": the same result, logits, adapter and files; "refused": a ValueError or TypeError of ours in
every process, and the model is as it was; "-": the twin refuses too.  Anything else is a failure.
"""

import argparse
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import minipeft as mp
from benchmarks.output import save_result
from benchmarks.processes import Outcome, together
from minipeft.io.prefixes import load_prefix, save_prefix

METHODS = ("LoRA", "DoRA", "QLoRA", "prefix", "prefix with MLP")
VOCABULARY, TOKENS, ROWS = 128, 12, 4
# float32 sums in another order: of two batches, and over the ranks
NEAR = 1e-5
Found = dict[str, Any]


def llama() -> Any:
    """A small random LLaMA, the same in every process."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make(method: str) -> Any:
    """The model with two adapters: "default" of this method, and a LoRA "other" over one layer."""
    model = llama()
    if method == "QLoRA":
        mp.quantize_model(model)
    if method.startswith("prefix"):
        mp.attach_prefix(model, 4, hidden=8 if method.endswith("MLP") else None)
    else:
        mp.inject_lora(model, ["q_proj", "down_proj"], rank=4, dora=method == "DoRA")
    mp.inject_lora(model, ["v_proj"], rank=2, name="other")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    mp.use_adapters(model, "default")
    return model.eval()


def cut(model: Any) -> Any:
    """fully_shard of each block, then of the whole."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def replicated(model: Any) -> Any:
    """DistributedDataParallel around the model; some adapters are off."""
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def parallelized(model: Any) -> Any:
    """Tensor parallelism of attention, and of the rest where its adapter can be cut."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = mp.ColwiseParallel, mp.RowwiseParallel
    plan = {f"model.layers.*.self_attn.{name}_proj": columns() for name in "qkv"}
    plan["model.layers.*.self_attn.o_proj"] = rows()
    if METHOD[0] != "DoRA":  # its norms go over whole rows
        plan |= {f"model.layers.*.mlp.{name}_proj": columns() for name in ("gate", "up")}
        plan["model.layers.*.mlp.down_proj"] = rows()
    mp.parallelize(model, mesh, plan)
    return model


ENGINES: dict[str, Callable[[Any], Any]] = {"FSDP2": cut, "DDP": replicated, "TP": parallelized}


def ids(rank: int) -> Tensor:
    """The batch of one process."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)


def loss(model: Any, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens."""
    logits = model(input_ids=batch).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def contents(folder: Path) -> Found:
    """What the files in a folder hold, once every process is done with them.

    Of a safetensors file its header and its data: the order of the header's names is by chance.
    """
    dist.barrier()
    found: Found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            found[f"{name}: header"] = json.loads(data[8 : 8 + length])
            data = data[8 + length :]
        found[name] = data
    return found


def steps(model: Any, folder: Path, rank: int, world: int) -> Found:
    """Two steps; the twin has the batches of all processes."""
    optimizer = torch.optim.SGD(list(mp.adapter_parameters(model, name="default")), lr=0.1)
    alone = type(model).__name__ == "LlamaForCausalLM"
    for _ in range(2):
        optimizer.zero_grad()
        for batch in [ids(each) for each in range(world)] if alone else [ids(rank)]:
            (loss(model, batch) / (world if alone else 1)).backward()
        mp.check_gradients(model)
        optimizer.step()
    return {}


def drawn(model: Any) -> dict[str, Tensor]:
    """Other values for every tensor of the adapter."""
    generator = torch.Generator().manual_seed(2)
    state = mp.adapter_state_dict(model, name="default")
    return {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def saved(save: Callable[[Any, Path], object]) -> Callable[..., Found]:
    """A save, and its files."""

    def run(model: Any, folder: Path, rank: int, world: int) -> Found:
        if isinstance(model, nn.parallel.DistributedDataParallel):  # each has the whole model
            folder = folder / str(rank)
        save(model, folder)
        return contents(folder)

    return run


def plain(call: Callable[[Any], object]) -> Callable[..., Found]:
    """A call whose result shows in the model."""

    def run(model: Any, folder: Path, rank: int, world: int) -> Found:
        call(model)
        return {}

    return run


def loaded(model: Any, folder: Path, rank: int, world: int, *, prefix: bool = False) -> Found:
    """A file of a third model of the same layout, with other values, into this one."""
    source = make(METHOD[0])
    mp.load_adapter_state_dict(source, drawn(source), name="default")
    place = folder.parent / f"source-{rank}"
    if prefix:
        save_prefix(source, place, reparametrization=True)
        load_prefix(model, place)
    else:
        mp.save_peft(source, place, name="default")
        if type(model).__name__ == "LlamaForCausalLM":  # a whole model has the name already
            mp.load_adapter_state_dict(model, drawn(source), name="default")
        else:
            mp.load_peft(model, place)
    return {}


def off(model: Any, folder: Path, rank: int, world: int) -> Found:
    """The logits of the base."""
    with mp.disable_adapters(model):
        return {"base": logits_of(model)}


def gathered_base(model: Any, folder: Path, rank: int, world: int) -> Found:
    """The base's state into the model itself, times two where it is no code."""
    twin = make(METHOD[0])
    state = mp.base_state_dict(twin)
    mp.load_base_state_dict(
        model, {n: t * 2 if t.is_floating_point() else t for n, t in state.items()}
    )
    return {}


METHOD = [""]  # of the cell that runs
FUNCTIONS: dict[str, Callable[..., Found]] = {
    "two steps": steps,
    "adapter_state_dict": lambda m, *_: mp.adapter_state_dict(m, name="default"),
    "load_adapter_state_dict": plain(
        lambda m: mp.load_adapter_state_dict(m, drawn(m), name="default")
    ),
    "save_peft": saved(lambda m, folder: mp.save_peft(m, folder, name="default")),
    "save_prefix": saved(lambda m, folder: save_prefix(m, folder)),
    "save_prefix with its MLP": saved(
        lambda m, folder: save_prefix(m, folder, reparametrization=True)
    ),
    "save_pretrained": saved(lambda m, folder: getattr(m, "module", m).save_pretrained(folder)),
    "load_peft": loaded,
    "load_prefix": lambda *a: loaded(*a, prefix=True),
    "load_base_state_dict": gathered_base,
    # no bytes: scales that are cut for TP are float32
    "count_parameters": lambda m, *_: {"count": tuple(mp.count_parameters(m))[:2]},
    "disable_adapters": off,
    "scale_adapters": plain(lambda m: mp.scale_adapters(m, 0.5, name="other")),
    "use_adapters": plain(lambda m: mp.use_adapters(m, ["default", "other"])),
    "use_adapters(rows=)": plain(
        lambda m: mp.use_adapters(m, rows=["default", "other", None, "default"])
    ),
    "combine_adapters": plain(lambda m: mp.combine_adapters(m, ["other"], [2.0], new_name="sum")),
    "replace_adapter": plain(lambda m: mp.replace_adapter(m, "other", {})),
    "merge": plain(mp.merge),
    "unmerge": plain(mp.unmerge),
    "remove": plain(mp.remove),
    "remove(merge=True)": plain(lambda m: mp.remove(m, merge=True)),
    "quantize_model": plain(mp.quantize_model),
    "dequantize_model": plain(mp.dequantize_model),
    "save_quantized": saved(lambda m, folder: mp.save_quantized(m, folder)),
    "inject_lora": plain(lambda m: mp.inject_lora(m, ["o_proj"], rank=2, name="new")),
    "inject_qlora": plain(lambda m: mp.inject_qlora(m, ["o_proj"], rank=2)),
    "attach_prefix": plain(lambda m: mp.attach_prefix(m, 2, name="new")),
    "train_biases": plain(lambda m: mp.train_biases(m, "all")),
    "train_modules": plain(lambda m: mp.train_modules(m, ["norm"])),
    "train_tokens": plain(lambda m: mp.train_tokens(m, [1, 2])),
    "extend_vocabulary": plain(lambda m: mp.extend_vocabulary(m, 2)),
}


def logits_of(model: Any) -> Tensor:
    """The logits of the first process's batch."""
    with torch.no_grad():
        return model(input_ids=ids(0)).logits.clone()


def look(model: Any) -> Found:
    """What a call may have changed: logits and adapters."""
    found: Found = {"logits": logits_of(model)}
    with_adapters = any(hasattr(type(m), "adapter_parameters") for m in model.modules())
    state = mp.adapter_state_dict(model) if with_adapters else {}
    return found | {name.removeprefix("module."): value for name, value in state.items()}


def difference(mine: Any, its: Any) -> float:
    """0 where two results are equal in every bit; the largest difference beside the largest number.

    Infinity where they are no numbers, or of other shapes.
    """
    if isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.shape == its.shape:
        mine, its = mine.double(), its.double()
        return float((mine - its).abs().max() / its.abs().max().clamp(min=1e-30))
    return 0.0 if not isinstance(mine, Tensor) and mine == its else float("inf")


def tried(call: Callable[[], Found]) -> Outcome:
    """What a call returned, or how it failed."""
    try:
        return Outcome(call())
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        return Outcome(None, type(error).__name__, str(error), where)


def by_us(outcome: Outcome) -> bool:
    """Whether an error is a refusal of this library, in its own words."""
    ours = "minipeft" in Path(outcome.raised_in).parts
    return ours and outcome.error in ("ValueError", "TypeError", "CannotExpress")


def cell(rank: int, world: int, engine: str, method: str, name: str, folder: Path) -> Found:
    """One function on one model: the verdict, and how far it is from the twin."""
    METHOD[0] = method
    call = FUNCTIONS[name]
    mine_of, world_of = (0, 1) if engine == "TP" else (rank, world)  # whose batch: all have one
    model, twin = ENGINES[engine](make(method)), make(method)
    before = [(key, id(value)) for key, value in model.named_parameters()]
    dist.barrier()
    its = tried(lambda: call(twin, folder / f"twin-{rank}", mine_of, world_of))
    mine = tried(lambda: call(model, folder / "shared", mine_of, world_of))
    if mine.error:
        after = [(key, id(value)) for key, value in model.named_parameters()]
        if not by_us(mine):
            return {"verdict": "failed", "why": f"{mine.error}: {mine.text}"}
        if before != after:
            return {"verdict": "failed", "why": f"refused, and changed the model: {mine.text}"}
        return {"verdict": "-" if its.error else "refused", "why": mine.text}
    if its.error:
        return {"verdict": "failed", "why": f"the twin refuses: {its.text}"}
    mine, its = {**mine.value, **look(model)}, {**its.value, **look(twin)}
    if mine.keys() != its.keys():
        return {"verdict": "failed", "why": f"one has {sorted(mine.keys() ^ its.keys())[:5]}"}
    off_by = {key: difference(mine[key], its[key]) for key in mine}
    worst = max(off_by, key=off_by.__getitem__)
    if off_by[worst] > NEAR:
        return {"verdict": "failed", "why": f"{worst} is {off_by[worst]:.1e} off"}
    return {"verdict": "right", "off": off_by[worst], "why": ""}


def packed_bytes(model: Any) -> int:
    """Bytes of codes and scales that this process holds."""
    total = 0
    for module in model.modules():
        if hasattr(module, "packed_parameters"):
            for value in module.packed_parameters().values():
                local = value.to_local() if hasattr(value, "to_local") else value
                total += local.numel() * local.element_size()
    return total


def work(
    rank: int, world: int, engine: str, methods: list[str], names: list[str], folder: str
) -> list[Found]:
    """All functions of some columns, in one of the processes."""
    warnings.simplefilter("ignore")
    found = []
    for method in methods:
        cells = {
            name: cell(rank, world, engine, method, name, Path(folder) / f"{method}-{number}")
            for number, name in enumerate(names)
        }
        packed = packed_bytes(ENGINES[engine](make(method)))
        found.append({"cells": cells, "packed": packed, "whole": packed_bytes(make(method))})
    return found


def columns(
    engine: str, world: int, methods: list[str], names: list[str] | None = None, *,
    seconds: float = 900,
) -> list[Found]:  # fmt: skip
    """For each method {function: verdict}, and the bytes of packed weights on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = together(
            world, work, engine, methods, names or list(FUNCTIONS), folder, seconds=seconds
        )
    for outcome in outcomes:
        if outcome.error:
            raise RuntimeError(f"{engine} {world}: {outcome.error}: {outcome.text}")
    made = []
    for number, method in enumerate(methods):
        parts = [outcome.value[number] for outcome in outcomes]
        cells: Found = {}
        for name in parts[0]["cells"]:
            each = [part["cells"][name] for part in parts]
            agree = len({one["verdict"] for one in each}) == 1
            cells[name] = each[0] if agree else {"verdict": "failed", "why": f"ranks say {each}"}
        made.append({
            "engine": engine, "processes": world, "method": method, "cells": cells,
            "packed_bytes": [part["packed"] for part in parts],
            "packed_bytes_in_one_process": parts[0]["whole"],
        })  # fmt: skip
    return made


def main() -> int:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4], help="of FSDP2")
    parser.add_argument("--output", type=Path, default=None, help="a folder for the JSON")
    arguments = parser.parse_args()
    engines = [("FSDP2", world) for world in arguments.processes] + [("DDP", 2), ("TP", 2)]
    table = []
    for engine, world in engines:
        methods = [m for m in arguments.methods if engine != "TP" or not m.startswith("prefix")]
        table += columns(engine, world, methods) if methods else []
    for one in table:
        packed, whole = one["packed_bytes"], one["packed_bytes_in_one_process"]
        held = f"; packed bytes {packed} of {whole}" if whole else ""
        print(f"\n{one['engine']}, {one['processes']} processes, {one['method']}{held}")
        for name, found in one["cells"].items():
            off_by = f" ({found['off']:.1e} off)" if found.get("off") else ""
            print(f"  {name:26} {found['verdict']}{off_by}  {found['why'][:110]}")
    failed = [c for one in table for c in one["cells"].values() if c["verdict"] == "failed"]
    counted = sum(len(one["cells"]) for one in table)
    print(f"\n{counted} cells, {len(failed)} failed")
    if arguments.output is not None:
        save_result(arguments.output, "sharded", columns=table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
