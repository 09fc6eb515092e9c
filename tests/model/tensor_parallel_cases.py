"""One process of a tensor-parallel job: what it computes beside what one process computes.

Run by test_tensor_parallel.py, which asserts on the JSON that the first process prints.
"""

import copy
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import minipeft as mp
from tests.gloo import leave

COLUMNS = ["gate", "up", "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"]  # colwise styles
ROWS = ["down", "down_proj", "o_proj"]  # rowwise
RANK, BLOCK = 4, 32
KINDS = [
    "dense", "nf4", "nf4 flat", "plain nf4", "plain dense", "dense stacked", "nf4 stacked",
    "dense pissa", "dense dora", "nf4 dora",
]  # fmt: skip


class MLP(nn.Module):
    """Llama's MLP, with biases, so that one added twice is seen."""

    def __init__(self, hidden: int = 64, inner: int = 256) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def adapted(model: nn.Module, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in `dtype` with adapters of this kind, whose B is not zero."""
    if "nf4" in kind:
        mp.quantize_model(model, block_size=BLOCK, skip=["lm_head"] if "llama" in kind else ())
    model = model.to(dtype)
    if not kind.startswith("plain"):
        named = {n.split(".")[-1] for n, _ in model.named_modules()}
        columns, rows = ([n for n in names if n in named] for names in (COLUMNS, ROWS))
        start: dict[str, Any] = {"dtype": dtype}
        start |= {"init": mp.starts.pissa()} if "pissa" in kind else {}
        mp.inject_lora(model, columns, RANK, 8, dora="dora" in kind, **start)
        mp.inject_lora(model, rows, RANK, 8, **start)
        if "stacked" in kind:
            mp.inject_lora(model, [*columns, *rows], 2, name="fr", dtype=dtype)
        for parameter in mp.adapter_parameters(model):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def plan(model: nn.Module) -> dict[str, Any]:
    """Styles for the layers of an MLP or a Llama, by name."""
    prefixes = {
        "gate": "",
        "gate_proj": "model.layers.*.mlp.",
        "q_proj": "model.layers.*.self_attn.",
    }
    names = ["gate", "up", "down"]
    if not isinstance(model, MLP):
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found = {}
    for name in names:
        prefix = "" if isinstance(model, MLP) else prefixes["gate_proj"]
        prefix = prefixes["q_proj"] if name[0] in "qkvo" else prefix
        style = mp.RowwiseParallel if name in ROWS else mp.ColwiseParallel
        found[prefix + name] = style()
    return found


def whole(tensor: Tensor | None) -> Tensor | None:
    """The tensor of all processes together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def off(mine: Tensor | None, reference: Tensor | None) -> float:
    """The largest difference over the largest value of the reference."""
    mine = whole(mine)
    if mine is None or reference is None:
        assert mine is reference is None
        return 0.0
    assert mine.shape == reference.shape
    assert bool(reference.abs().max() > 0)
    return float((mine - reference).abs().max() / reference.abs().max())


def compared(
    one: nn.Module, cut: nn.Module, run: Callable[[nn.Module], tuple[Tensor, Tensor | None]]
) -> dict[str, Any]:
    """Outputs, gradients, both again after a step, and the parameters after it."""
    found: dict[str, Any] = {"gradients": 0, "worst": {}}
    for step in ("first", "second"):
        results = []
        for model in (one, cut):
            out, x = run(model)
            out.square().mean().backward()
            results.append((out.detach(), None if x is None else x.grad))
        (out, dx), (out_cut, dx_cut) = results
        worst = {"output": off(out_cut, out), "input gradient": off(dx_cut, dx)}
        pairs = list(zip(mp.adapter_parameters(one), mp.adapter_parameters(cut), strict=True))
        worst["gradients"] = max((off(b.grad, a.grad) for a, b in pairs), default=0.0)
        found["gradients"] = sum(a.grad is not None for a, _ in pairs)
        for model in (one, cut):
            if parameters := list(mp.adapter_parameters(model)):
                optimizer = torch.optim.SGD(parameters, lr=0.5)
                optimizer.step()
                optimizer.zero_grad()
        theirs, mine = mp.adapter_state_dict(one), mp.adapter_state_dict(cut)
        assert list(theirs) == list(mine)
        worst["parameters"] = max((off(mine[n], v) for n, v in theirs.items()), default=0.0)
        found["worst"][step] = worst
    return found


def codes(model: nn.Module) -> tuple[int, int]:
    """Bytes of packed codes here, and in all processes together."""
    here = everywhere = 0
    for module in model.modules():
        if isinstance(module, mp.NF4Linear):
            packed = module._parameters["packed"]
            assert packed is not None
            everywhere += packed.numel()
            here += packed.to_local().numel() if isinstance(packed, DTensor) else packed.numel()
    return here, everywhere


def spoiled(model: nn.Module, rank: int) -> nn.Module:
    """Other values in all processes but the first, which must not count."""
    if rank:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(2)
                elif parameter.shape[-1] > 4 and parameter.dim() == 2:
                    parameter.flatten()[0] ^= 255
    return model


def mlp_case(mesh: DeviceMesh, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """One MLP, cut by `parallelize`, with and without checkpointing."""
    hidden = 80 if "flat" in kind else 64  # 80 is no multiple of the block
    torch.manual_seed(0)
    one = adapted(MLP(hidden), kind, dtype)
    cut = spoiled(copy.deepcopy(one), mesh.get_rank())
    names = mp.parallelize(cut, mesh, plan(cut))
    if "compiled" in kind:
        cut.compile(backend="aot_eager", fullgraph=True)
    given = torch.randn(6, hidden, dtype=dtype)

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        x = given.clone().requires_grad_()
        return model(x), x

    found = {"names": names, **compared(one, cut, run), "codes": codes(cut)}
    cut.checkpointed = "compiled" not in kind  # type: ignore[assignment]  # both: torch refuses
    found["checkpointed"] = compared(one, cut, run)["worst"]
    with torch.no_grad():
        found["copied"] = off(copy.deepcopy(cut.eval())(given), one.eval()(given))
        try:
            found["pickled"] = off(pickle.loads(pickle.dumps(cut))(given), one(given))
        except TypeError as error:
            found["pickled"] = str(error)
        if not kind.startswith("plain"):
            with mp.disable_adapters(one), mp.disable_adapters(cut):
                found["disabled"] = off(cut(given), one(given))
    if "nf4" in kind:
        plain = [cut.get_submodule(n) for n in ("gate", "down")]
        while not isinstance(plain[0], mp.NF4Linear):
            plain = [layer.base for layer in plain]
        found["double_quant"] = [layer.double_quant for layer in plain]
    if not kind.startswith("plain"):
        mp.remove(one)
        mp.remove(cut)
        found["removed"] = off(cut(given), one(given))
    return found


def llama_case(mesh: DeviceMesh, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """A small Llama, cut by torch's `parallelize_module`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=97, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    one = adapted(LlamaForCausalLM(config), f"{kind} llama", dtype)
    cut = spoiled(copy.deepcopy(one), mesh.get_rank())
    for name, module in cut.named_modules():  # what is not cut is each process's own
        if name.split(".")[-1] in ("embed_tokens", "lm_head") or "norm" in name:
            module.load_state_dict(one.get_submodule(name).state_dict())
    parallelize_module(cut, mesh, plan(cut))
    ids = torch.randint(97, (2, 7))

    def run(model: nn.Module) -> tuple[Tensor, None]:
        return model(input_ids=ids).logits, None

    return {**compared(one, cut, run), "codes": codes(cut)}


def refusals(mesh: DeviceMesh) -> Iterator[tuple[str, str, bool]]:
    """What each refusal says here, and whether everything stayed as it was."""
    rank = mesh.get_rank()

    def tried(
        model: nn.Module, styles: dict[str, Any], by: Any = mp.parallelize
    ) -> tuple[str, bool]:
        before = {n: (p, _here(p).clone()) for n, p in model.named_parameters()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        try:
            by(model, mesh, styles)
        except (ValueError, TypeError) as error:
            after = dict(model.named_parameters())
            same = list(before) == list(after) and all(
                p is after[n] and (p.is_meta or torch.equal(_here(p), value))
                for n, (p, value) in before.items()
            )
            now = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
            return f"{type(error).__name__}: {error}", same and now == hooks
        return "no error", False

    def mlp(kind: str, hidden: int = 64, inner: int = 256) -> MLP:
        torch.manual_seed(0)
        return adapted(MLP(hidden, inner), kind)  # type: ignore[return-value]

    row, col = mp.RowwiseParallel, mp.ColwiseParallel
    yield "odd", *tried(mlp("dense", 65), {"up": col(), "down": col()})
    yield "block", *tried(mlp("nf4", 64, 96), {"up": col(), "down": row()})
    yield "flat columns", *tried(mlp("nf4", 80), {"gate": row()})
    yield "by torch", *tried(mlp("nf4", 64, 96), {"down": row()}, parallelize_module)
    yield "dora", *tried(mlp("dense dora"), {"up": row()})
    merged = mlp("dense").eval()
    mp.merge(merged)
    yield "merged", *tried(merged, {"up": col()})
    trainable = mlp("plain nf4")
    trainable.up.bias.requires_grad_()
    yield "trainable", *tried(trainable, {"up": col()})
    yield "other kind", *tried(nn.Sequential(nn.LayerNorm(4)), {"0": col()})
    yield "no match", *tried(mlp("dense"), {"up": col(), "upp": col()})
    prefixed = mlp("dense")
    prefixed.prefix = mp.PrefixEncoder([(2, 8, 8)], 4)
    yield "prefix", *tried(prefixed, {"up": col()})
    yield "no style", *tried(mlp("dense"), {"up": "col"})
    yield "twice named", *tried(mlp("dense"), {"up": col(), "u*": row()})
    yield "meta", *tried(mlp("dense").to("meta"), {"up": col()})
    other = mlp("dense")
    if rank:
        torch.manual_seed(0)
        other = MLP().double()
        mp.inject_lora(other, ["gate", "up"], 8)
    yield "other rank", *tried(other, {"up": col()})
    missing = mlp("dense")
    if rank:
        del missing.up
    yield "missing layer", *tried(missing, {"up": col()})
    again = mlp("dense")
    mp.parallelize(again, mesh, {"up": col()})
    yield "again", *tried(again, {"up": col()})
    yield "inject after", *tried(again, {}, lambda m, *_: mp.inject_lora(m, ["up"], 2, name="fr"))


def _here(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def behaviours(mesh: DeviceMesh) -> dict[str, Any]:
    """An exception in forward, keywords, layouts, dropout, switching, taking adapters off."""
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    one = adapted(MLP(), "dense")
    cut = copy.deepcopy(one)
    mp.parallelize(cut, mesh, plan(cut))
    x = torch.randn(4, 6, 64, dtype=torch.float64)
    for bad in (x[..., :3], x.int()):
        try:
            cut(bad)
        except Exception as error:
            found.setdefault("raised", []).append(type(error).__name__)
    kept = all(isinstance(p, DTensor) for p in cut.parameters())
    sizes = (cut.up.in_features, cut.up.out_features, cut.up.base.out_features)
    found["after an exception"] = [kept, *sizes]
    try:
        cut.up(x=x)
    except TypeError as error:
        found["by keyword"] = str(error)
    torch.manual_seed(dist.get_rank())  # other masks in each process
    for layer in (cut.up, cut.gate, cut.down):
        layer.dropout = 0.5
    cut(x).square().mean().backward()
    found["dropped"] = max(_spread(p.grad) for p in mp.adapter_parameters(cut))
    torch.manual_seed(0)
    for n, p in one.named_parameters():
        assert bool(p.isfinite().all()), n
    one, other = adapted(MLP(), "dense"), adapted(MLP(), "dense")
    other.load_state_dict(one.state_dict())
    from torch.distributed.tensor import Replicate, Shard

    styles = {
        "gate": mp.ColwiseParallel(input_layouts=Shard(1)),  # a sequence in parts
        "up": mp.ColwiseParallel(input_layouts=Shard(1)),
        "down": mp.RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    mp.parallelize(other, mesh, styles)
    here = x.chunk(mesh.size(), 1)[mesh.get_local_rank()].clone().requires_grad_()
    all_x = x.clone().requires_grad_()
    out, wanted = other(here), one(all_x)
    found["layouts"] = [off(out, wanted)]
    out.redistribute(placements=[Replicate()]).to_local().square().mean().backward()
    wanted.square().mean().backward()
    gradient = all_x.grad.chunk(mesh.size(), 1)[mesh.get_local_rank()]  # type: ignore[union-attr]
    found["layouts"].append(off(here.grad, gradient))
    pairs = zip(mp.adapter_parameters(one), mp.adapter_parameters(other), strict=True)
    found["layouts"] += [off(b.grad, a.grad) for a, b in pairs]
    return found


def _spread(gradient: Tensor | None) -> float:
    """The largest difference between processes of a gradient that is whole on each."""
    assert isinstance(gradient, DTensor)
    if not gradient.placements[0].is_replicate():
        return 0.0
    local = gradient.to_local()
    first = local.clone()
    dist.broadcast(first, 0)
    return float((local - first).abs().max())


def main() -> None:
    """Run the cases named as arguments; the first process prints what they found."""
    torch.set_num_threads(1)
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['MEET']}", rank=rank, world_size=n,
        timeout=timedelta(seconds=90),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (n,))
    found: dict[str, Any] = {}
    for argument in sys.argv[1:]:
        case, _, kind = argument.partition(":")
        if case == "refusals":
            found[argument] = {what: [text, same] for what, text, same in refusals(mesh)}
        elif case == "behaviours":
            found[argument] = behaviours(mesh)
        else:
            dtype = torch.float32 if "float32" in case else torch.float64
            run = mlp_case if case.startswith("mlp") else llama_case
            found[argument] = run(mesh, kind, dtype)
    every: list[Any] = [None] * n
    dist.all_gather_object(every, found)
    if rank == 0:
        print(json.dumps(every))
    leave()


if __name__ == "__main__":
    main()
