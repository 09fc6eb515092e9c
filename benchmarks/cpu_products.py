"""Parts of `python -m benchmarks.cpu` about one weight: bits, decode, quantize, product."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minipeft as mp
from benchmarks.cpu import Line, line
from benchmarks.lora_speed import in_turn, ratio
from minipeft import double_quant, nf4, ops, qlora
from minipeft.fast import nf4 as by_tables
from minipeft.ops import Packed

OUT, IN = 11008, 4096  # LLaMA-7B's widest layer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_numba() -> bool:
    return mp.backend("cpu")["dequantize_nf4"].startswith("numba")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bits, any NaN equal to any other."""
    kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    both = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros(a.shape).bool()
    return bool((both | (a.view(kind) == b.view(kind))).all())


def bits(rounds: int) -> list[Line]:
    """Random weights: how many of 2,000 decodes and 500 encodes differ from the plain ones."""
    lines = []
    for dtype in DTYPES:
        wrong = {"decodes": 0, "encodes": 0}
        for case in range(2000):
            torch.manual_seed(case)
            most = 6000 if case % 25 else 300_000  # of these some are work for several threads
            n, size = int(torch.randint(1, most, ())), 2 ** int(torch.randint(5, 13, ()))
            w = torch.randn(n) * 2.0 ** torch.randint(-30, 15, (n,))
            w = w.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
            w[torch.rand(n) < 0.1] = 0
            if case % 7 == 0:
                w[: size if case % 2 else n] = 0
            packed, absmax = nf4.encode(w, size)
            if case < 500:
                found = mp.quantize_nf4(w, block_size=size)
                scales = mp.quantize_absmax(absmax)
                pairs = zip((*found, *scales), (packed, absmax, *double_quant.encode(absmax, 256)),
                            strict=True)  # fmt: skip
                wrong["encodes"] += not all(_equal(a, b) for a, b in pairs)
            weight = Packed(packed, absmax, size)
            if case % 2:
                code, scale, offset = mp.quantize_absmax(absmax)
                weight = Packed(packed, code, size, scale, offset)
            if case % 3 == 0:
                weight = weight._replace(codebook=torch.randn(16))
            expected = double_quant.decode_weights(weight, [n], dtype)
            wrong["decodes"] += not _equal(qlora.decode(weight, [n], dtype), expected)
        for what, count in wrong.items():
            lines.append(line(f"{_name(dtype)} {what} that differ", "nothing", [count]))
    if any(row["ratios"] != [0] for row in lines):
        raise SystemExit(f"bits differ: {lines}")
    return lines


def _weight() -> tuple[Tensor, Packed]:
    w = torch.randn(OUT, IN) * 0.02
    return w, mp.NF4Linear.from_linear(_linear(w)).state()


def _linear(w: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(IN, OUT, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(w)
    return layer


def decode(rounds: int) -> list[Line]:
    """A whole weight with double-quantised scales."""
    import bitsandbytes.functional as peer

    w, weight = _weight()
    lines = []
    for dtype in DTYPES:
        codes, state = peer.quantize_4bit(
            w.to(dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        out = torch.empty(OUT, IN, dtype=dtype)
        source = torch.zeros_like(out)

        def by_pytorch(out: Tensor = out) -> None:
            by_tables.decode_into(out, weight)

        runs: dict[str, Any] = {
            "copy": lambda out=out, source=source: out.copy_(source),
            "pytorch": by_pytorch,
            "ours": lambda dtype=dtype: qlora.decode(weight, [OUT, IN], dtype),
            "bitsandbytes": lambda codes=codes, state=state: peer.dequantize_4bit(codes, state),
            "plain": lambda dtype=dtype: double_quant.decode_weights(weight, [OUT, IN], dtype),
        }
        if has_numba():
            from minipeft_kernels.cpu.decode import decode_into

            runs["numba"] = lambda out=out: decode_into(out, weight)
        times = in_turn(runs, rounds)
        name = _name(dtype)
        for row in ("numba", "pytorch"):
            if row in times:
                lines.append(line(f"{name} {row}, given buffer", "copy", ratio(times, row, "copy")))
        lines += [
            line(f"{name}, fresh result", "bitsandbytes", ratio(times, "ours", "bitsandbytes")),
            line(
                f"{name} bitsandbytes, fresh result", "copy", ratio(times, "bitsandbytes", "copy")
            ),
            line(f"{name}, fresh result", "plain functions", ratio(times, "ours", "plain")),
        ]
    return lines


def quantize(rounds: int) -> list[Line]:
    """A whole weight and its scales."""
    import bitsandbytes.functional as peer

    lines = []
    for dtype in DTYPES:
        w = (torch.randn(OUT, IN) * 0.02).to(dtype)

        def theirs(w: Tensor = w) -> None:
            peer.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")

        def ours(w: Tensor = w) -> None:
            mp.quantize_absmax(mp.quantize_nf4(w)[1])

        times = in_turn({"ours": ours, "theirs": theirs}, min(rounds, 3))
        lines.append(line(f"{_name(dtype)} quantise", "bitsandbytes",
                          ratio(times, "ours", "theirs")))  # fmt: skip
    return lines


def product(rounds: int) -> list[Line]:
    """x W^T and dy W, gated against float64 on a few rows of the result."""
    _, weight = _weight()
    dense = qlora.decode(weight, [OUT, IN], torch.float32)
    lines = []
    for rows in (1, 16, 128, 512):
        x, dy = torch.randn(rows, IN), torch.randn(rows, OUT)

        def forward(x: Tensor = x) -> Tensor:
            return ops.call("nf4_linear", x, weight, None, OUT)

        def backward(dy: Tensor = dy) -> Tensor:
            return ops.call("nf4_linear_input_gradient", dy, weight, IN)

        # sums of 4,096 and 11,008 float32 products: rounding measured 3e-7 of the largest
        for found, a, b in ((forward(), x, dense.T), (backward(), dy, dense)):
            exact = a[:2].double() @ b.double()
            assert (found[:2] - exact).abs().max() < 5e-6 * exact.abs().max()
        runs: dict[str, Any] = {
            "dense": lambda x=x: F.linear(x, dense),
            "forward": forward,
            "dense gradient": lambda dy=dy: dy @ dense,
            "gradient": backward,
        }
        with mp.use_kernels(False):
            without = in_turn(runs, rounds)
        times = in_turn(runs, rounds) if has_numba() else {}
        for name, measured in (("numba", times), ("without numba", without)):
            if measured:
                lines += [
                    line(f"{rows} rows, {name}", "dense F.linear",
                         ratio(measured, "forward", "dense")),
                    line(f"{rows} rows, gradient, {name}", "dense dy W",
                         ratio(measured, "gradient", "dense gradient")),
                ]  # fmt: skip
    return lines
