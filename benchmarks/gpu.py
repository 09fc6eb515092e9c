"""Products with a 4-bit weight on a GPU, beside a bfloat16 F.linear: `python -m benchmarks gpu`.

A gate comes first (gpu_gate.py).  Then each cell has the time of a call in a CUDA graph and from
Python, over weights that take turns so that no cache holds them, and its floor: the least bytes
over the measured bandwidth or the operations over the measured rate, whichever takes longer.
Without a GPU the floors of known cards are printed, and that nothing was timed.
"""

import argparse
import functools
import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import minipeft as mp
from benchmarks.gpu_host import host_work
from benchmarks.gpu_timers import (
    copies_for,
    eager_seconds,
    graph_seconds,
    measured_bandwidth,
    measured_rate,
    seconds,
)
from benchmarks.output import save_result

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))  # (out, in) of LLaMA layers
ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight in blocks of 64, double-quantised
CARDS = {"H100": (3.35e12, 990e12), "A100-80": (2.04e12, 312e12), "RTX 4090": (1.008e12, 165e12)}
Cell = dict[str, Any]


def floor(n: int, k: int, m: int, bits: float, bandwidth: float, rate: float) -> float:
    """Seconds that no product of (m, k) with a weight (n, k) of `bits` a weight is below."""
    return max((n * k * bits / 8 + 2 * m * (n + k)) / bandwidth, 2 * m * n * k / rate)


def predicted() -> list[Cell]:
    """The floors by the data sheets of some cards; nothing is timed."""
    print("no CUDA or ROCm device: nothing was timed.  Floors by data sheets, microseconds:")
    cells = []
    for card, (bandwidth, rate) in CARDS.items():
        for n, k in SHAPES:
            for m in ROWS:
                dense, packed = (floor(n, k, m, bits, bandwidth, rate) for bits in (16, BITS))
                cells.append({"card": card, "n": n, "k": k, "m": m, "dense": dense, "nf4": packed})
                if m in (1, 16, 512):
                    print(f"  {card:8} {n:5} x {k:5}, {m:3} rows: bfloat16 {dense * 1e6:6.1f}, "
                          f"NF4 {packed * 1e6:6.1f} ({packed / dense:.2f})")  # fmt: skip
    return cells


def tried(run: Callable[[], Any]) -> Any:
    """What `run` returns; None and a traceback if it fails, and the job goes on."""
    try:
        return run()
    except Exception:
        traceback.print_exc()
        return None


def peers(n: int, k: int) -> dict[str, list[Callable[[torch.Tensor], Any]]]:
    """The same product by other libraries, where they are installed."""
    found: dict[str, list[Callable[[torch.Tensor], Any]]] = {}
    try:
        import bitsandbytes

        made = []
        for _ in range(copies_for(n * k // 2)):
            layer = bitsandbytes.nn.Linear4bit(
                k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            made.append(layer.to("cuda").requires_grad_(False))
        found["bitsandbytes"] = made
    except (ImportError, RuntimeError) as error:
        print(f"bitsandbytes: {error}")
    try:
        try:
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4
        except ImportError:  # before torchao 0.18
            from torchao.dtypes.nf4tensor import linear_nf4, to_nf4

        weights = [to_nf4(torch.randn(n, k, device="cuda").bfloat16(), 64, 256) for _ in range(2)]
        found["torchao"] = [functools.partial(_torchao, linear_nf4, w) for w in weights]
    except (ImportError, RuntimeError) as error:
        print(f"torchao: {error}")
    return found


def _torchao(product: Any, weight: Any, x: torch.Tensor) -> Any:
    return product(x, weight)


def time_products(limits: tuple[float, float]) -> list[Cell]:
    """Forward and input gradient for every shape and number of rows, a line each."""
    from benchmarks.gpu_tune import random_weight

    cells = []
    for n, k in SHAPES:
        packed = [random_weight(n, k) for _ in range(copies_for(n * k // 2))]
        dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies_for(2 * n * k))]
        others = peers(n, k)
        for m in ROWS:
            x, dy = (torch.randn(m, width, device="cuda").bfloat16() for width in (k, n))
            operators = torch.ops.minipeft
            kinds = {
                "F.linear": [functools.partial(F.linear, x, w) for w in dense],
                "nf4": [functools.partial(operators.nf4_linear, x, *w, None, n) for w in packed],
                "dy @ W": [functools.partial(torch.matmul, dy, w) for w in dense],
                "nf4 gradient": [
                    functools.partial(operators.nf4_linear_input_gradient, dy, *w, k)
                    for w in packed
                ],
                **{name: [functools.partial(f, x) for f in made] for name, made in others.items()},
            }
            cell: Cell = {"n": n, "k": k, "m": m, "graph": {}, "eager": {}}
            cell["floor"] = floor(n, k, m, BITS, *limits)
            cell["dense_floor"] = floor(n, k, m, 16, *limits)
            for name, calls in kinds.items():
                with torch.no_grad():
                    cell["graph"][name] = tried(functools.partial(graph_seconds, calls))
                    cell["eager"][name] = tried(functools.partial(eager_seconds, calls))
            cells.append(cell)
            print(line_of(cell), flush=True)
        del packed, dense, others, kinds
        gc.collect()
        torch.cuda.empty_cache()
    return cells


def line_of(cell: Cell) -> str:
    """One cell as text: microseconds in a graph (from Python), ratio to bfloat16, to the floor."""

    def us(kind: str, name: str) -> str:
        value = cell[kind].get(name)
        return "failed" if value is None else f"{value * 1e6:.1f}"

    def ratio(above: str, below: str) -> str:
        a, b = cell["graph"].get(above), cell["graph"].get(below)
        return "-" if a is None or b is None else f"{a / b:.2f}"

    found = cell["graph"].get("nf4")
    over = "-" if found is None else f"{found / cell['floor']:.1f}"
    text = (
        f"{cell['n']:5} x {cell['k']:5} m {cell['m']:4}: "
        f"F.linear {us('graph', 'F.linear')} ({us('eager', 'F.linear')}), "
        f"nf4 {us('graph', 'nf4')} ({us('eager', 'nf4')}) = {ratio('nf4', 'F.linear')}, "
        f"{over} x floor {cell['floor'] * 1e6:.1f}; dy W {us('graph', 'dy @ W')}, "
        f"nf4 {us('graph', 'nf4 gradient')} = {ratio('nf4 gradient', 'dy @ W')}"
    )
    others = [name for name in cell["graph"] if name in ("bitsandbytes", "torchao")]
    return text + "".join(f"; {name} {us('graph', name)}" for name in others)


def time_dequantize(bandwidth: float) -> list[Cell]:
    """Decoding into a given buffer: time, and bytes read and written over the bandwidth."""
    from benchmarks.gpu_tune import random_weight
    from minipeft_kernels.triton import nf4

    cells = []
    for n, k in SHAPES:
        weights = [random_weight(n, k) for _ in range(copies_for(n * k // 2))]
        out = [torch.empty(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        calls = [
            functools.partial(nf4.dequantize_into, out[i % 2], w) for i, w in enumerate(weights)
        ]
        found = tried(functools.partial(graph_seconds, calls))
        least = n * k * (BITS / 8 + 2) / bandwidth
        if found is not None:
            print(f"dequantize {n} x {k}: {found * 1e6:.1f} us, {found / least:.2f} x floor "
                  f"{least * 1e6:.1f}", flush=True)  # fmt: skip
        cells.append({"n": n, "k": k, "graph": found, "floor": least})
    return cells


def time_layer(m: int = 2048, size: int = 4096, rank: int = 16) -> Cell:
    """Forward and backward of one layer: LoRA over bfloat16 and over NF4, in turns."""

    def layer(four_bit: bool) -> Any:
        base = torch.nn.Linear(size, size, bias=False, device="cuda", dtype=torch.bfloat16)
        return mp.LoRALinear(mp.NF4Linear.from_linear(base) if four_bit else base, rank)

    x = torch.randn(m, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layers = {"lora": layer(False), "qlora": layer(True)}

    def step(name: str) -> None:
        layers[name](x).sum().backward()

    return _in_turns({name: functools.partial(step, name) for name in layers}, 10)


def time_step(batch: int, layers: int = 4, length: int = 512, rank: int = 16) -> Cell:
    """A whole training step of a LLaMA of 7B's sizes with few layers: LoRA and QLoRA in turns.

    `busy` has the seconds in which kernels of one step ran: what is left where the host keeps up.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, vocab_size=32000, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 32000, (batch, length), device="cuda")

    def prepared(inject: Any) -> Callable[[], None]:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).bfloat16()
        inject(model, "all-linear", rank, 2 * rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)

        def step() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {"lora": prepared(mp.inject_lora), "qlora": prepared(mp.inject_qlora)}
    found = _in_turns(steps, 3)
    found["busy"] = {name: busy_seconds(step) for name, step in steps.items()}
    return {"tokens": batch * length, **found}


def busy_seconds(run: Callable[[], Any]) -> float:
    """Seconds that kernels take in one call, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return float(sum(event.device_time for event in kernels)) / 1e6


def _in_turns(steps: dict[str, Callable[[], None]], repeats: int, rounds: int = 7) -> Cell:
    """Median seconds of each, and the ratios of qlora to lora, one a round."""
    for step in steps.values():
        seconds(step, 3)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, repeats))
    pairs = zip(times["qlora"], times["lora"], strict=True)
    return {"seconds": times, "ratios": sorted(a / b for a, b in pairs)}


def line_of_ratios(found: Cell) -> str:
    """QLoRA's time over LoRA's, and its spread; the same for the time that kernels take."""
    ratios = found["ratios"]
    text = f"QLoRA / LoRA {ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    if busy := found.get("busy"):
        text += f", kernels alone {busy['qlora'] / busy['lora']:.3f}"
    return text


def add_options(job: argparse.ArgumentParser) -> None:
    """The job's own command line."""
    job.add_argument("--parts", nargs="+", choices=["gate", "times", "rows", "step", "tune"],
                     default=["gate", "times", "rows", "step"])  # fmt: skip
    job.add_argument("--tune", action="store_true", help="the same as --parts tune")
    job.add_argument("--workers", type=int, default=8, help="processes that compile for tune")
    job.add_argument("--output", type=Path, default=Path(__file__).parent / "results")


def run(arguments: argparse.Namespace) -> int:
    """The gpu job with these arguments."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}
    if not torch.cuda.is_available():
        content = {"predicted": predicted(), "host": tried(host_work)}
        save_result(arguments.output, "gpu", timed=False, **content)
        return 0
    parts = ["tune"] if arguments.tune else arguments.parts
    print(torch.cuda.get_device_name(), mp.backend("cuda", shape=(1, 4096)), flush=True)
    status = 0
    if "times" in parts:
        content["host"] = tried(host_work)
    if "gate" in parts:
        from benchmarks.gpu_gate import gate
        from benchmarks.gpu_rows import gate_rows

        content["gate"] = gate(arguments.workers)
        content["gate"] += gate_rows()
        status = int(any(row["failures"] for row in content["gate"]))
    if "tune" in parts:
        from benchmarks.gpu_tune import compile_all, tune

        tried(lambda: compile_all(list(SHAPES), arguments.workers))
        content["tune"] = tried(lambda: tune(list(SHAPES), arguments.output / "plans.json"))
    if "times" in parts:
        limits = measured_bandwidth(), measured_rate()
        print(
            f"copy {limits[0] / 1e12:.2f} TB/s, product {limits[1] / 1e12:.0f} TFLOP/s", flush=True
        )
        content["limits"] = limits
        content["dequantize"] = tried(lambda: time_dequantize(limits[0]))
        content["products"] = tried(lambda: time_products(limits))
    if "rows" in parts:
        from benchmarks.gpu_rows import time_rows

        content["rows"] = tried(time_rows)
    if "step" in parts:
        measured = {"layer": time_layer} | {
            f"step of {512 * batch} tokens": functools.partial(time_step, batch)
            for batch in (4, 16)
        }
        for name, measure in measured.items():
            content[name] = tried(measure)
            if content[name] is not None:
                print(f"{name}: {line_of_ratios(content[name])}", flush=True)
    written = save_result(arguments.output, "gpu", timed=True, **content)
    if content.get("products"):
        tried(lambda: plot(content["products"], written.with_suffix(".png")))
    return status


def plot(cells: list[Cell], path: Path) -> None:
    """Microseconds over rows, a picture for each weight: kernels, what they compete with, floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((cell["n"], cell["k"]) for cell in cells))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.4), sharey=True)
    for axis, shape in zip(axes, shapes, strict=True):
        mine = [cell for cell in cells if (cell["n"], cell["k"]) == shape]
        rows = [cell["m"] for cell in mine]
        for name in ("F.linear", "nf4", "bitsandbytes", "torchao"):
            times = [cell["graph"].get(name) for cell in mine]
            if any(times):
                axis.plot(
                    rows, [t and t * 1e6 for t in times], marker="o", markersize=3, label=name
                )
        axis.plot(rows, [cell["floor"] * 1e6 for cell in mine], "k:", label="floor of nf4")
        axis.set(title=f"{shape[0]} x {shape[1]}", xlabel="rows", xscale="log", yscale="log")
    axes[0].set_ylabel("microseconds in a CUDA graph")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"written: {path.name}")


def main() -> int:
    """`python -m benchmarks.gpu`, for machines without the packages of the other jobs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add_options(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
