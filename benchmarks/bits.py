"""Whether two checkouts compute the same bits: outputs, gradients and files of each kind of layer.

    PYTHONPATH=OLD:OLD/kernels python benchmarks/bits.py save old.safetensors
    PYTHONPATH=NEW:NEW/kernels python benchmarks/bits.py save new.safetensors
    python benchmarks/bits.py compare old.safetensors new.safetensors

One script runs on both, so it finds a public name wherever a checkout has it.  `compare` prints
each tensor that differs, and the number of those that do not; its exit status says whether any did.
"""

import argparse
import importlib
import pkgutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Found = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def public(*names: str) -> Any:
    """The first of these names that minipeft or one of its modules defines."""
    import minipeft

    modules = [minipeft]
    for info in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
        modules.append(importlib.import_module(info.name))
    for name in names:
        for module in modules:
            if not isinstance(found := getattr(module, name, modules), list):
                return found
    raise AttributeError(f"minipeft has none of {names}")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values that depend on nothing but the shape and the seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def fill(module: nn.Module) -> nn.Module:
    """Give every floating-point parameter values of its own."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.is_floating_point():
                parameter.copy_(0.3 * drawn(*parameter.shape, seed=number))
    return module


def passes(layer: nn.Module, *inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Output and gradients: training, eval, scaled, off, merged; and the weight as it is read."""
    floats = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    for mode in ("train", "eval", "scaled", "off", "merged"):
        layer.train(mode == "train")
        if mode == "merged" and not hasattr(layer, "merge"):
            continue
        if mode == "merged":
            layer.merge()  # type: ignore[operator]
        if mode in ("scaled", "off") and not hasattr(type(layer), "adapter_parameters"):
            continue
        layer.scale = 0.5 if mode == "scaled" else 1.0  # type: ignore[assignment]
        layer.enabled = mode != "off"  # type: ignore[assignment]
        for x in floats:
            x.requires_grad_(True).grad = None
        layer.zero_grad()
        out = layer(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        yield mode, out.detach()
        if out.requires_grad:
            (out.float() * drawn(*out.shape)).sum().backward()
            for name, parameter in layer.named_parameters():
                if parameter.grad is not None:
                    yield f"{mode}.grad.{name}", parameter.grad
            for number, x in enumerate(floats):
                if x.grad is not None:
                    yield f"{mode}.grad.input{number}", x.grad.clone()
        if mode == "merged":
            layer.unmerge()  # type: ignore[operator]
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        yield "weight", weight.detach()
    for name, tensor in layer.state_dict().items():
        yield f"state.{name}", tensor


def layers(dtype: torch.dtype) -> dict[str, Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Each kind of layer over a small module of this dtype."""
    linear = lambda: fill(nn.Linear(96, 64)).to(dtype)  # noqa: E731
    x = lambda *shape: drawn(*(shape or (2, 5, 96)), dtype=dtype)  # noqa: E731
    ids = torch.arange(12).view(2, 6)

    def conv1d() -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        return fill(Conv1D(64, 96)).to(dtype)

    def over(kind: str, base: nn.Module, *inputs: Any, **more: Any) -> Any:
        made = public(kind)(base, 4, 8.0, **more)
        owned = made.adapter_parameters()
        with torch.no_grad():
            for number, name in enumerate(sorted(owned)):
                if owned[name].is_floating_point() and not name.endswith("0"):
                    owned[name].copy_(0.2 * drawn(*owned[name].shape, seed=number))
        return passes(made, *inputs)

    def nf4(**more: Any) -> nn.Module:
        made: nn.Module = public("NF4Linear").from_linear(linear(), **more)
        return made

    table = lambda: fill(nn.Embedding(40, 64)).to(dtype)  # noqa: E731
    experts = lambda: nn.Parameter(0.3 * drawn(3, 64, 96, dtype=dtype))  # noqa: E731
    expert = torch.tensor([0, 2, 1, 1, 0, 2, 2])

    def start() -> Any:
        found = public("init_pissa", "pissa")
        return found if found.__name__ == "init_pissa" else found()

    conv2d = lambda **more: fill(nn.Conv2d(8, 6, 3, **more)).to(dtype)  # noqa: E731
    attention = lambda: fill(nn.MultiheadAttention(64, 4, batch_first=True)).to(dtype)  # noqa: E731
    return {
        "NF4Linear": lambda: passes(nf4(), x()),
        "NF4Linear, float32 scales": lambda: passes(nf4(double_quant=False), x()),
        "NF4Linear, block 32": lambda: passes(nf4(block_size=32), x(7, 96)),
        "NF4Conv1D": lambda: passes(public("NF4Conv1D").from_linear(conv1d()), x()),
        "NF4Embedding": lambda: passes(public("NF4Embedding").from_embedding(table()), ids),
        "NF4Experts": lambda: passes(public("NF4Experts").from_weight(experts()), x(7, 96), expert),
        "LoRALinear": lambda: over("LoRALinear", linear(), x()),
        "LoRALinear, rows": lambda: over("LoRALinear", linear(), x(2, 96)),
        "LoRALinear, rsLoRA": lambda: over("LoRALinear", linear(), x(), rank_stabilized=True),
        "LoRALinear, twice": lambda: over("LoRALinear", public("LoRALinear")(linear(), 2), x()),
        "LoRALinear, Conv1D": lambda: over("LoRALinear", conv1d(), x()),
        "LoRALinear, NF4Linear": lambda: over("LoRALinear", nf4(), x()),
        "LoRALinear, PiSSA": lambda: over("LoRALinear", linear(), x(), init=start()),
        "DoRALinear": lambda: over("DoRALinear", linear(), x()),
        "DoRALinear, NF4Linear": lambda: over("DoRALinear", nf4(), x()),
        "LoRAEmbedding": lambda: over("LoRAEmbedding", table(), ids),
        "DoRAEmbedding": lambda: over("DoRAEmbedding", table(), ids),
        "LoRAConv 1d": lambda: over("LoRAConv", fill(nn.Conv1d(8, 6, 3)).to(dtype), x(2, 8, 9)),
        "LoRAConv 2d": lambda: over("LoRAConv", conv2d(groups=2), x(2, 8, 9, 9)),
        "DoRAConv": lambda: over("DoRAConv", conv2d(), x(2, 8, 9, 9)),
        "LoRAFusedLinear": lambda: over(
            "LoRAFusedLinear", linear(), x(), slices={"q": 32, "k": 16, "v": 16}
        ),
        "LoRAMultiheadAttention": lambda: over(
            "LoRAMultiheadAttention", attention(), *[x(2, 5, 64)] * 3
        ),
        "LoRAExperts": lambda: over("LoRAExperts", experts(), x(7, 96), expert),
    }


def models(folder: Path) -> dict[str, Callable[[], Iterator[tuple[str, Tensor]]]]:
    """Whole models with what is trained beside LoRA, 4-bit bases, prefixes, and their files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import minipeft as mp

    ids = torch.arange(24).view(2, 12)

    def llama() -> nn.Module:
        config = LlamaConfig(
            vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
        )  # fmt: skip
        return fill(LlamaForCausalLM(config))

    def run(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        owned = list(mp.adapter_parameters(model))
        with torch.no_grad():
            for number, parameter in enumerate(owned):
                parameter.copy_(0.05 * drawn(*parameter.shape, seed=number))
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        yield "logits", out.logits.detach()
        for number, parameter in enumerate(owned):
            if parameter.grad is not None:
                yield f"grad.{number}", parameter.grad

    def files(place: Path) -> Iterator[tuple[str, Tensor]]:
        for path in sorted(place.rglob("*.safetensors")):
            for name, tensor in load_file(path).items():
                yield f"file.{path.name}.{name}", tensor

    def lora(name: str, **more: Any) -> Iterator[tuple[str, Tensor]]:
        model = llama()
        mp.inject_lora(model, more.pop("target", "all-linear"), 4, 8, **more)
        yield from run(model)
        mp.save_peft(model, folder / name)
        yield from files(folder / name)
        mp.remove(model, merge=True)
        yield "folded", model(input_ids=ids).logits.detach()

    def beside(name: str, add: Callable[[nn.Module], object]) -> Iterator[tuple[str, Tensor]]:
        model = llama()
        mp.inject_lora(model, ["q_proj", "v_proj"], 4)
        add(model)
        yield from run(model)
        mp.save_peft(model, folder / name)
        yield from files(folder / name)

    def four_bits() -> Iterator[tuple[str, Tensor]]:
        model = llama()
        mp.inject_qlora(model, ["q_proj", "up_proj"], 4)
        yield from run(model)
        mp.remove(model)
        public("save_quantized")(model, folder / "quantized")
        yield from files(folder / "quantized")

    def prefix(name: str, **more: Any) -> Iterator[tuple[str, Tensor]]:
        model = llama()
        mp.attach_prefix(model, 5, **more)
        yield from run(model)
        public("save_prefix")(model, folder / name)
        yield from files(folder / name)

    def prompt() -> Iterator[tuple[str, Tensor]]:
        model = llama()
        mp.attach_prompt(model, 5)
        yield from run(model)
        mp.save_peft(model, folder / "prompt")
        yield from files(folder / "prompt")

    return {
        "model, LoRA": lambda: lora("lora"),
        "model, DoRA": lambda: lora("dora", dora=True),
        "model, embedding": lambda: lora("table", target=["embed_tokens", "q_proj"]),
        "model, biases": lambda: beside("biases", lambda m: mp.train_biases(m, "all")),
        "model, modules": lambda: beside("whole", lambda m: mp.train_modules(m, ["norm"])),
        "model, tokens": lambda: beside("tokens", lambda m: mp.train_tokens(m, [3, 5])),
        "model, QLoRA": four_bits,
        "model, prefix": lambda: prefix("prefix"),
        "model, prefix by a network": lambda: prefix("network", hidden=16),
        "model, gated prefix": lambda: prefix("gated", gated=True),
        "model, prompt": prompt,
    }


def plain() -> Iterator[tuple[str, Tensor]]:
    """The functions of NF4 and double quantisation over odd sizes."""
    import minipeft as mp

    for n in (1, 7, 63, 64, 65, 4097, 70_001):
        for block in (32, 64, 4096):
            for kind, dtype in DTYPES.items():
                packed, absmax = mp.quantize_nf4(drawn(n, dtype=dtype), block_size=block)
                code, scale, offset = mp.quantize_absmax(absmax)
                dense = mp.dequantize_nf4(packed, absmax, (n,), block_size=block, dtype=dtype)
                again = mp.dequantize_absmax(code, scale, offset)
                for name, tensor in zip(
                    ("packed", "absmax", "code", "scale", "offset", "dense", "again"),
                    (packed, absmax, code, scale, offset, dense, again),
                    strict=True,
                ):
                    yield f"{n}.{block}.{kind}.{name}", tensor


def save(path: Path) -> None:
    """Compute everything and write it to one file."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {f"{kind}: {name}": run for kind, dtype in DTYPES.items()
                 for name, run in layers(dtype).items()}  # fmt: skip
        cases |= {"functions": plain, **models(Path(folder))}
        for name, run in cases.items():
            torch.manual_seed(0)
            for what, tensor in run():
                found[f"{name}: {what}"] = tensor.detach().contiguous().clone()
    save_file(found, path)
    print(f"{len(found):,} tensors of {len(cases)} cases: {path}")


def compare(old: Path, new: Path) -> int:
    """Print what differs; the number of tensors that do, or that one file lacks."""
    before, after = load_file(old), load_file(new)
    missing = sorted(before.keys() ^ after.keys())
    for name in missing:
        print(f"only in {'the first' if name in before else 'the second'}: {name}")
    differ = [
        name for name in before.keys() & after.keys()
        if before[name].dtype != after[name].dtype or before[name].shape != after[name].shape
        or not torch.equal(*(t[name].reshape(-1).view(torch.uint8) for t in (before, after)))
    ]  # fmt: skip
    for name in sorted(differ):
        print(f"differs: {name}")
    print(f"{len(before.keys() & after.keys()) - len(differ):,} equal in every bit, "
          f"{len(differ)} differ, {len(missing)} in one file only")  # fmt: skip
    return len(differ) + len(missing)


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)  # more threads sum in another order
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("save").add_argument("path", type=Path)
    comparing = jobs.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    arguments = parser.parse_args()
    if arguments.job == "save":
        save(arguments.path)
    else:
        raise SystemExit(min(1, compare(arguments.old, arguments.new)))


if __name__ == "__main__":
    main()
