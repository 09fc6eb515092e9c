"""Every adapter layer against float64: `python -m benchmarks.lora_table`.

A row is a layer over a dense or an NF4 base, with random factors.  The reference is torch's own
module in float64, whose weight is changed by a formula written out here; nothing of minipeft
computes it.  A cell is the largest difference over the largest value of the reference:

    forward, gradients   of the output; of the input and of every adapter parameter
    merged               the output after minipeft.merge
    unmerged             bits of the state and of the output that differ after unmerge
    saved, loaded        the output of a fresh model that loaded the file
    in PEFT              PEFT's output after loading the file onto the dense model
    from PEFT            our output after loading what PEFT saved, against PEFT's
"""

import argparse
import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import minipeft as mp
from benchmarks.output import save_result

RESULTS = Path(__file__).parent / "results"
LIMIT = 1e-5  # float32, sums of at most a few hundred products in another order
Tensors = dict[str, Tensor]
RANK, ALPHA = 4, 6.0
S = ALPHA / RANK


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Tensor:
        out = self.layer(*args)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def tied_llama() -> nn.Module:
    """A small LLaMA whose head is its embedding: PEFT ties adapters of transformers models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=33, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def output(model: nn.Module, *inputs: Any) -> Tensor:
    """What the model computes, as a tensor."""
    out = model(*inputs)
    found: Tensor = getattr(out, "logits", out)
    return found


class Mixture(nn.Module):
    """Expert weights that are indexed one expert at a time."""

    def __init__(self, experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_features, in_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ self.weight[i].T for i in range(self.weight.shape[0])])


def low_rank(p: Tensors) -> Tensors:
    """W + s B A."""
    return {"weight": S * p["lora_b"] @ p["lora_a"]}


def transposed(p: Tensors) -> Tensors:
    """The same where the weight is (in, out), or a table (tokens, dim)."""
    return {"weight": S * (p["lora_b"] @ p["lora_a"]).T}


def convolution(groups: int) -> Callable[[Tensors], Tensors]:
    """One 1x1 combination of rank kernels for each output channel, within its group."""

    def delta(p: Tensors) -> Tensors:
        a = p["lora_a"].reshape(groups, -1, *p["lora_a"].shape[1:])
        b = p["lora_b"].reshape(groups, -1, p["lora_b"].shape[1])
        kernels = [S * torch.tensordot(b[g], a[g], 1) for g in range(groups)]
        return {"weight": torch.cat(kernels)}

    return delta


def attention(p: Tensors) -> Tensors:
    """The input projection as one matrix, and the output projection."""
    return {
        "in_proj_weight": S * p["lora_b"] @ p["lora_a"],
        "out_proj.weight": S * p["out_lora_b"] @ p["out_lora_a"],
    }


def experts(p: Tensors) -> Tensors:
    """A product for each expert."""
    return {"": S * einsum(p["lora_b"], p["lora_a"], "e o r, e r i -> e o i")}


SLICES = {"q": 24, "k": 8, "v": 8}
FUSED_RANKS = {"q": 4, "k": 0, "v": 2}


@dataclass
class Case:
    """A kind of layer: the plain model, its input, and what the factors change."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    change: Callable[[Tensors], Tensors] | None  # None: read off the layer's own slices, see fused
    dora_axes: tuple[int, ...] | None = None  # of the weight, to take norms over
    settings: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = field(default_factory=dict)
    place: str = "layer"  # the name of what is wrapped
    nf4: dict[str, Any] | None = None  # arguments of quantize_model, where there is a 4-bit form


def conv1d_model() -> nn.Module:
    """transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(48, 64)
    nn.init.normal_(layer.bias)
    return Holder(layer)


def ids() -> Tensor:
    """Token numbers."""
    return torch.randint(0, 33, (3, 7))


def cases() -> list[Case]:
    """All rows; DoRA has the shape of what it is over."""
    linear = {"model": lambda: Holder(nn.Linear(64, 48)), "inputs": lambda: torch.randn(3, 5, 64)}
    table = {"model": lambda: Holder(nn.Embedding(33, 64)), "inputs": ids}
    conv2d = {
        "model": lambda: Holder(nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2)),
        "inputs": lambda: torch.randn(2, 8, 11, 9),
    }
    return [
        Case("Linear", **linear, change=low_rank, nf4={}),
        Case("Linear, rank-stabilised", **linear, change=lambda p: {"weight": ALPHA / RANK**0.5 *
             p["lora_b"] @ p["lora_a"]}, settings={"rank_stabilized": True},
             peft={"use_rslora": True}, nf4={}),
        Case("Conv1D", conv1d_model, lambda: torch.randn(3, 64), transposed, nf4={},
             peft={"fan_in_fan_out": True}),
        Case("Embedding", **table, change=transposed, nf4={"embeddings": True}),
        Case("Embedding, tied head", tied_llama, ids, transposed, settings={"tied": True},
             peft={"ensure_weight_tying": True}, place="model.embed_tokens"),
        Case("Conv1d, circular padding", lambda: Holder(nn.Conv1d(6, 8, 3, padding=1,
             padding_mode="circular")), lambda: torch.randn(2, 6, 9), convolution(1), peft=None),
        Case("Conv2d, stride 2, dilation 2", **conv2d, change=convolution(1), peft=None),
        Case("Conv2d, 2 groups", lambda: Holder(nn.Conv2d(8, 12, 3, padding=1, groups=2)),
             lambda: torch.randn(2, 8, 6, 5), convolution(2)),
        Case("Conv3d", lambda: Holder(nn.Conv3d(4, 6, 2)), lambda: torch.randn(1, 4, 4, 5, 3),
             convolution(1)),
        Case("MultiheadAttention", lambda: Holder(nn.MultiheadAttention(32, 4, batch_first=True)),
             lambda: (torch.randn(2, 7, 32),) * 3, attention, peft=None),
        Case("fused projection, ranks 4 0 2", lambda: Holder(nn.Linear(64, 40)),
             lambda: torch.randn(3, 64), None, peft=None, nf4={}),
        Case("experts", lambda: Holder(Mixture(3, 16, 64)), lambda: torch.randn(5, 64), experts,
             place="layer.weight", nf4={"experts": True}),
        Case("DoRA Linear", **linear, change=low_rank, dora_axes=(1,), nf4={}),
        Case("DoRA Embedding", **table, change=transposed, dora_axes=(0,),
             nf4={"embeddings": True}),
        Case("DoRA Conv2d", lambda: Holder(nn.Conv2d(8, 12, 3, padding=1)),
             lambda: torch.randn(2, 8, 6, 5), convolution(1), dora_axes=(1, 2, 3)),
    ]  # fmt: skip


def inject(case: Case, model: nn.Module) -> None:
    """Our layer, with random numbers where it starts at zero."""
    if case.change is None:
        mp.inject(
            model, ["layer"],
            lambda m: mp.layers.LoRAFusedLinear(m, FUSED_RANKS, ALPHA, slices=SLICES),
        )  # fmt: skip
    else:
        settings = dict(case.settings)
        tied = settings.pop("tied", False)
        dora = {"dora": True} if case.dora_axes else {}
        mp.inject_lora(model, [case.place], RANK, ALPHA, **settings, **dora)
        if tied:
            mp.tie_heads(model)
    with torch.no_grad():
        for key, value in mp.adapter_state_dict(model).items():
            if key.endswith("magnitude"):
                value.mul_(1 + 0.1 * torch.rand_like(value))
            else:
                value.normal_(std=0.2)


def fused_change(parameters: Tensors) -> Tensors:
    """Rows of q and v changed by their own products; k has none."""
    a, first, row, parts = parameters["lora_a"], 0, 0, []
    for name, size in SLICES.items():
        rank = FUSED_RANKS[name]
        if rank:
            b = parameters[f"lora_b_{name}"]
            parts.append(ALPHA / rank * b @ a[first : first + rank])
        else:
            parts.append(a.new_zeros(size, a.shape[1]))
        first, row = first + rank, row + size
    return {"weight": torch.cat(parts)}


def reference(case: Case, dense: nn.Module, ours: nn.Module, x: Any) -> tuple[Tensor, Tensors]:
    """Output and gradients in float64, by the formula."""
    plain = copy.deepcopy(dense).double()
    own = mp.adapter_state_dict(ours)
    prefix = f"{case.place}."
    leaves = {k.removeprefix(prefix): v.double().requires_grad_() for k, v in own.items()}
    changes = fused_change(leaves) if case.change is None else case.change(leaves)
    weights = {}
    for name, change in changes.items():
        key = f"{case.place}.{name}".rstrip(".")
        weight = plain.get_parameter(key).detach() + change
        if case.dora_axes:
            norm = weight.detach().square().sum(case.dora_axes, keepdim=True).sqrt()
            shape = [1 if i in case.dora_axes else -1 for i in range(weight.dim())]
            weight = leaves["magnitude"].reshape(shape) / norm * weight
        weights[key] = weight
    inputs = tuple(t.double().requires_grad_() if t.is_floating_point() else t for t in as_tuple(x))
    if len(inputs) == 3:
        inputs = (inputs[0],) * 3  # self-attention
    y = torch.func.functional_call(plain, weights, inputs, tie_weights=True)
    y = getattr(y, "logits", y)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape))
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if inputs[0].is_floating_point():
        found["x"] = inputs[0].grad
    return y.detach(), found


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    """Arguments as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def off_by(ours: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = exact.abs().max().clamp(min=1e-30)
    return float((ours.detach().double() - exact).abs().max() / scale)


def measure(case: Case, nf4: bool) -> dict[str, float | None]:
    """One row."""
    torch.manual_seed(0)
    start = case.model().eval()
    x = case.inputs()
    if nf4:
        mp.quantize_model(start, **(case.nf4 or {}))
    dense = copy.deepcopy(start)
    if nf4:
        mp.dequantize_model(dense)
    model = copy.deepcopy(start)
    inject(case, model)
    model.train(start.training)
    exact, gradients = reference(case, dense, model, x)
    row: dict[str, float | None] = {}
    inputs = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in as_tuple(x))
    if len(inputs) == 3:
        inputs = (inputs[0],) * 3
    y = output(model, *inputs)
    row["forward"] = off_by(y, exact)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    own = dict(model.get_submodule(case.place).named_parameters(recurse=False))
    worst = [off_by(own[n].grad, g) for n, g in gradients.items() if n != "x"]
    if "x" in gradients:
        worst.append(off_by(inputs[0].grad, gradients["x"]))
    row["gradients"] = max(worst)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        before = output(model, *as_tuple(x))
        mp.merge(model)
        row["merged"] = off_by(output(model, *as_tuple(x)), exact)
        mp.unmerge(model)
        differing = int((output(model, *as_tuple(x)) != before).sum())
    for name, value in model.state_dict().items():
        differing += int((value.reshape(-1).view(torch.uint8) !=
                          state[name].reshape(-1).view(torch.uint8)).sum())  # fmt: skip
    row["unmerged, bits"] = differing
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        fresh = copy.deepcopy(start)
        mp.load_peft(fresh, folder)
        with torch.no_grad():
            row["saved, loaded"] = off_by(output(fresh.eval(), *as_tuple(x)), exact)
        try:
            in_peft, from_peft = peft_both_ways(case, Path(folder), dense, start, x, exact)
        except RuntimeError:
            if case.name not in WRONG_IN_PEFT:
                raise
            in_peft = from_peft = None
    row["in PEFT"], row["from PEFT"] = in_peft, from_peft
    return row


def peft_both_ways(
    case: Case, folder: Path, dense: nn.Module, start: nn.Module, x: Any, exact: Tensor
) -> tuple[float | None, float | None]:
    """Our file in PEFT, and PEFT's file here."""
    import peft

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(dense), folder).eval()
        in_peft = off_by(output(theirs, *as_tuple(x)), exact)
        if case.peft is None:
            return in_peft, None
        target: dict[str, Any] = {"target_modules": [case.place]}
        if case.place == "layer.weight":
            target = {"target_modules": [], "target_parameters": [case.place]}
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, use_dora=bool(case.dora_axes), **target, **case.peft
        )
        theirs = peft.get_peft_model(copy.deepcopy(dense), config).eval()
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=0.2)
        theirs.save_pretrained(folder / "theirs")
        ours = copy.deepcopy(start)
        mp.load_peft(ours, folder / "theirs")
        return in_peft, off_by(
            output(ours.eval(), *as_tuple(x)), output(theirs, *as_tuple(x)).double()
        )


# what PEFT 0.21 computes wrongly, so that its output says nothing about our file
WRONG_IN_PEFT = {
    "Conv1d, circular padding": "ignores the padding mode",
    "Conv2d, stride 2, dilation 2": "drops the dilation",
    "MultiheadAttention": "applies out_proj's delta twice",
}


def main() -> int:
    """Print the table; exit status 1 if a difference is above 1e-5 where PEFT is right too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # PEFT's own
    table: Table | None = None
    rows: dict[str, dict[str, float | None]] = {}
    wrong = []
    for case in cases():
        for nf4 in (False, True) if case.nf4 is not None else (False,):
            name = f"{case.name}{', NF4' if nf4 else ''}"
            row = measure(case, nf4)
            rows[name] = row
            table = table or Table("layer", *row)
            shown = []
            for column, value in row.items():
                peft_is_wrong = "PEFT" in column and case.name in WRONG_IN_PEFT
                limit = 0 if "bits" in column else LIMIT
                if value is not None and value > limit and not peft_is_wrong:
                    wrong.append(f"{name}: {column}")
                text = "-" if value is None else str(value) if "bits" in column else f"{value:.1e}"
                shown.append(f"({text})" if peft_is_wrong else text)
            table.add_row(name, *shown)
    Console(width=140).print(table)
    print("in brackets, since PEFT computes something else:", WRONG_IN_PEFT)
    print("above the limit:", wrong or "none")
    save_result(arguments.output, "lora_table", rows=rows)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
