"""Parts of `python -m benchmarks.cpu` about whole layers and steps, and about calls."""

import copy
import functools
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks.cpu import Line, line
from benchmarks.cpu_products import has_numba
from benchmarks.data import Batches
from benchmarks.lora_speed import in_turn, ratio
from benchmarks.loss import loss_of
from benchmarks.methods import METHODS
from benchmarks.models import LlamaSizes, load_model
from minipeft import ops
from minipeft.adapters import products
from minipeft.fast.backend import tried_first
from minipeft.measure.run import optimizer_for

LAYER = LlamaSizes(4096, 11008, 1, 32, 32, 256)  # LLaMA-7B's, with a small vocabulary
CONFIG = {"target": "all-linear", "rank": 16, "alpha": 32}
TIMES = 5  # peers need seconds for a step


def _made(method: str, model: Any) -> Any:
    return METHODS[method].prepare(copy.deepcopy(model), CONFIG).model


def _steps(models: dict[str, Any], tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of a decoder in the middle of a model: its input has a gradient."""
    torch.manual_seed(tokens)
    x, grad_out = torch.randn(2, 1, tokens, LAYER.hidden)

    def step(model: Any) -> Tensor:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        dtype = next(inner.model.embed_tokens.parameters()).dtype
        given = x.to(dtype).clone().requires_grad_()
        out = inner.model(inputs_embeds=given, use_cache=False).last_hidden_state
        out.backward(grad_out.to(dtype))
        grad: Tensor = given.grad
        return grad.float()

    return {name: lambda model=model: step(model) for name, model in models.items()}


def layer(rounds: int) -> list[Line]:
    """A LLaMA-7B layer in float32, and in bfloat16 over float32."""
    base = load_model(LAYER, torch.float32, 0)
    models = {name: _made(name, base) for name in ("qlora", "peft-qlora", "peft-lora")}
    half = _made("qlora", base.bfloat16())
    del base
    lines = []
    for tokens in (16, 128, 512):
        steps = _steps(models | {"bf16": half}, tokens)
        ours, theirs = steps["qlora"](), steps["peft-qlora"]()
        # bitsandbytes bins the codes of scales, so a few differ: measured 5e-4 (4 bits cost 0.28)
        assert (ours - theirs).norm() < 5e-3 * theirs.norm()

        def without(step: Callable[[], Tensor] = steps["qlora"]) -> Tensor:
            with mp.use_kernels(False):
                return step()

        # panels without numba: other sums, measured 1e-6; bfloat16 rounds by 4e-3, several times
        assert (without() - ours).norm() < 1e-4 * ours.norm()
        assert (steps["bf16"]() - ours).norm() < 0.1 * ours.norm()
        times = in_turn(steps | {"without": without}, min(rounds, TIMES))
        where = f"{tokens} tokens"
        if has_numba():
            lines += [
                line(f"QLoRA, {where}", "PEFT + bitsandbytes", ratio(times, "qlora", "peft-qlora")),
                line(f"QLoRA, {where}", "PEFT LoRA, dense", ratio(times, "qlora", "peft-lora")),
            ]
        lines += [
            line(f"QLoRA without numba, {where}", "PEFT + bitsandbytes",
                 ratio(times, "without", "peft-qlora")),
            line(f"QLoRA bfloat16, {where}", "QLoRA float32", ratio(times, "bf16", "qlora")),
        ]  # fmt: skip
    return lines


def _training_step(model: Any, optimizer: Any, batch: Batches) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    return run


def step(rounds: int) -> list[Line]:
    """SmolLM2: forward, backward and update of one short text."""
    base = load_model(None, torch.float32, 0)
    models = {name: _made(name, base) for name in ("qlora", "peft-qlora")}
    lines = []
    for tokens in (64, 256):
        ids = torch.randint(1000, (1, tokens))
        batch = Batches(ids, torch.ones_like(ids), ids)
        runs = {}
        for name, model in models.items():
            model.train()
            optimizer = optimizer_for(model, 1e-6)

            runs[name] = _training_step(model, optimizer, batch)
        times = in_turn(runs, rounds)
        lines.append(line(f"SmolLM2 QLoRA, 1 x {tokens} tokens", "PEFT + bitsandbytes",
                          ratio(times, "qlora", "peft-qlora")))  # fmt: skip
    return lines


def shared(rounds: int) -> list[Line]:
    """Layers of one input: x A^T of all of them in one product, over a product for each."""
    lines = []
    for what, hidden, sizes in (
        ("SmolLM2, query, key, value", 576, (576, 192, 192)),
        ("SmolLM2, gate, up", 576, (1536, 1536)),
        ("LLaMA-7B, query, key, value", 4096, (4096, 4096, 4096)),
    ):
        dense = [nn.Linear(hidden, size, bias=False).requires_grad_(False) for size in sizes]
        for kind, bases in (
            ("dense", dense), ("NF4", [mp.NF4Linear.from_linear(base) for base in dense]),
        ):  # fmt: skip
            layers = [mp.LoRALinear(base, 16) for base in bases]
            for one in layers:
                nn.init.normal_(one.lora_b)
            for tokens in (16, 128):
                runs = _both_ways(layers, torch.randn(1, tokens, hidden))
                times = in_turn(runs, rounds)
                lines.append(line(f"x A^T shared, {what}, {kind}, {tokens} tokens", "each its own",
                                  ratio(times, "together", "apart")))  # fmt: skip
    return lines


def _both_ways(layers: list[mp.LoRALinear], given: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of the layers, which all get `given`."""

    def apart(x: Tensor) -> list[Tensor]:
        return [one(x) for one in layers]

    def together(x: Tensor) -> list[Tensor]:
        narrow = (x[0] @ torch.cat([one.lora_a for one in layers]).T).split(layers[0].rank, -1)
        return [
            torch.addmm(one.base(x)[0], part, one.lora_b.T, alpha=one.scaling)[None]
            for one, part in zip(layers, narrow, strict=True)
        ]

    def step(way: Callable[[Tensor], list[Tensor]]) -> Tensor:
        x = given.clone().requires_grad_()
        outputs = way(x)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return x.grad  # type: ignore[return-value]

    # the same sums in another order: float32, measured 1.6e-7 of the norm
    assert (step(apart) - step(together)).norm() < 1e-5 * step(apart).norm()
    return {"apart": lambda: step(apart), "together": lambda: step(together)}


def _halves(dtype: torch.dtype, tokens: int) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """A frozen layer as an adapter calls it, and by itself: forward and input gradient."""
    base = nn.Linear(4096, 4096, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, 4096).to(dtype)
    runs: dict[str, dict[str, Callable[[], Tensor]]] = {"forward": {}, "input gradient": {}}
    for name, run in {"ours": functools.partial(products.call, base), "torch": base}.items():
        given = x.clone().requires_grad_()
        out = run(given)
        runs["forward"][name] = functools.partial(torch.no_grad()(run), x)
        runs["input gradient"][name] = lambda out=out, given=given: torch.autograd.grad(
            out, given, x, retain_graph=True
        )[0]
    return runs


def half(rounds: int) -> list[Line]:
    """4096 x 4096 in 16 bits, on a CPU that does not multiply them."""
    lines = []
    for dtype in sorted(products.SLOW_ON_CPU, key=str):
        for tokens in (1, 16, 128, 512):
            runs = _halves(dtype, tokens)
            if tokens > 16:
                del runs["input gradient"]  # torch's takes 14 seconds at 128 tokens
            for what, both in runs.items():
                ours, torchs = (both[name]().float() for name in ("ours", "torch"))
                assert (ours - torchs).norm() < 2**-7 * torchs.norm()  # each is rounded once
                times = in_turn(both, min(rounds, TIMES))
                name = f"{str(dtype).removeprefix('torch.')} {what}, {tokens} tokens"
                lines.append(line(name, "torch's path", ratio(times, "ours", "torch")))
    if not lines:
        why = "half: this CPU multiplies 16 bits; --level avx2 measures as if it did not"
        print(why, file=sys.stderr)  # lines go to stdout
    return lines


def overhead(rounds: int) -> list[Line]:
    """One row through layers of 64 x 64 whose 4-bit products are empty functions."""
    empty, out = types.ModuleType("empty_kernel"), torch.zeros(1, 64)
    empty.nothing = lambda *_: out  # type: ignore[attr-defined]
    sys.modules["empty_kernel"] = empty
    rows = [
        ops.Implementation(name, "empty", lambda *_: True, "empty_kernel", "nothing")
        for name in ("nf4_linear", "nf4_linear_input_gradient")
    ]
    dense, x = nn.Linear(64, 64), torch.randn(1, 64)
    needs_grad = x.clone().requires_grad_()
    quantized = mp.NF4Linear.from_linear(dense)

    def in_inference(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(100):
                    layer(x)

        return run

    def in_training(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                layer(needs_grad)

        return run

    def with_backward(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                layer(needs_grad).backward(out)

        return run

    lines = []
    with tried_first(rows[0]), tried_first(rows[1]):
        for what, make in (("inference", in_inference), ("training, forward", in_training),
                           ("training, forward and backward", with_backward)):  # fmt: skip
            times = in_turn({"dense": make(dense), "4-bit": make(quantized)}, 3 * rounds)
            lines.append(line(f"NF4Linear, {what}", "nn.Linear", ratio(times, "4-bit", "dense")))
    return lines


FIRST = """
import sys, time
import torch
start = time.perf_counter()
import minipeft as mp
imported = time.perf_counter() - start
assert "numba" not in sys.modules
layer, x = torch.nn.Linear(64, 64), torch.randn(3, 64, requires_grad=True)
start = time.perf_counter()
mp.NF4Linear.from_linear(layer)(x).sum().backward()
print(imported, time.perf_counter() - start)
"""


def first(rounds: int) -> list[Line]:
    """Seconds from nothing to a gradient, in fresh processes."""

    def measured(**environment: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", FIRST], capture_output=True, text=True, check=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        return [float(text) for text in done.stdout.split()]

    found: dict[str, list[float]] = {"empty": [], "full": [], "without": [], "import": []}
    for _ in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as folder:
            found["empty"].append(measured(NUMBA_CACHE_DIR=folder)[1])
            imported, used = measured(NUMBA_CACHE_DIR=folder)
        found["full"].append(used)
        found["import"].append(imported)
        found["without"].append(measured(MINIPEFT_KERNELS="0")[1])
    return [
        line("first use, empty cache", "a second", found["empty"]),
        line("first use, full cache", "a second", found["full"]),
        line("first use, without numba", "a second", found["without"]),
        line("import minipeft after torch", "a second", found["import"]),
    ]
