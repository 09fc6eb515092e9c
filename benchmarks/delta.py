"""A 3 GB checkpoint as a delta of another and back: `python -m benchmarks.delta`.

Writes two sharded checkpoints of random weights, the second tuned by a twentieth of their size,
makes the delta in a process of its own, and the tuned model from it in another; each says its time
and its peak of resident memory above what it had after the imports.  Compares every tensor with the
tuned model's in every bit.  The limit: the two largest tensors and 64 MiB.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.output import save_result

MIB = 2**20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000


def shapes_of(gigabytes: float, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LLaMA of about this size."""
    layer = {
        **{f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE), "input_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    numbers = sum(torch.Size(shape).numel() for shape in layer.values())
    total = gigabytes * 1e9 / dtype.itemsize
    layers = max(1, round((total - 2 * VOCABULARY * HIDDEN) / numbers))
    middle = {f"model.layers.{i}.{n}": shape for i in range(layers) for n, shape in layer.items()}
    table = (VOCABULARY, HIDDEN)
    return {"model.embed_tokens.weight": table, **middle, "lm_head.weight": table}


def write_sources(folder: Path, gigabytes: float, dtype: torch.dtype) -> list[int]:
    """The base and the tuned model; returns the bytes of their tensors."""
    from minipeft.io.bitsandbytes.checkpoint import INDEX, index_text
    from minipeft.io.shards import ShardWriter, split

    shapes = shapes_of(gigabytes, dtype)
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, shape in shapes.items()}
    files = split(sizes, 10**9)
    torch.manual_seed(0)
    for name in ("base", "tuned"):
        (folder / name).mkdir()
        (folder / name / INDEX).write_bytes(index_text(files, sizes))
        (folder / name / "config.json").write_text("{}")
    for file, names in files.items():
        specs = {name: (dtype, shapes[name]) for name in names}
        with (
            ShardWriter(folder / "base" / file, specs) as base,
            ShardWriter(folder / "tuned" / file, specs) as tuned,
        ):
            for name in names:
                weight = torch.randn(shapes[name]).mul_(0.02)
                base.write(name, weight.to(dtype))
                tuned.write(name, weight.add_(torch.randn(shapes[name]), alpha=0.001).to(dtype))
            base.finish()
            tuned.finish()
    return sorted(sizes.values())


def status(key: str) -> int:
    """A size in /proc/self/status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def work(what: str, folder: Path, stored: str) -> None:
    """Make the delta or add it, and print what that took."""
    from minipeft.io.delta import apply_delta, make_delta

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = status("VmRSS"), time.perf_counter()
    if what == "make":
        dtype = DTYPES.get(stored)
        report = make_delta(folder / "base", folder / "tuned", folder / "delta", dtype=dtype)
    else:
        report = apply_delta(folder / "base", folder / "delta", folder / "out")
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before, **asdict(report)}))


def in_its_own_process(what: str, folder: Path, stored: str) -> dict[str, float]:
    """What `work` printed there."""
    command = [sys.executable, "-m", "benchmarks.delta", "--work", what, str(folder), stored]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def differing(one: Path, other: Path) -> tuple[int, int]:
    """Tensors that differ in some bit, and all tensors."""
    from minipeft.io.bitsandbytes.checkpoint import open_weights
    from minipeft.io.header import digest

    with open_weights(one, mmap=False) as a, open_weights(other, mmap=False) as b:
        if a.specs.keys() != b.specs.keys():
            return len(a.specs.keys() ^ b.specs.keys()), len(a.specs)
        return sum(digest(a.view(n)) != digest(b.view(n)) for n in a.specs), len(a.specs)


def compare(folder: Path, gigabytes: float, dtype: str, stored: str) -> dict[str, float]:
    """Both ways and what they show, printed and returned."""
    sizes = write_sources(folder, gigabytes, DTYPES[dtype])
    limit = sum(sizes[-2:]) + 64 * MIB
    print(
        f"checkpoint: {sum(sizes) / 1e9:.2f} GB of {dtype} in {len(sizes)} tensors, the two "
        f"largest {sizes[-1] / MIB:.0f} and {sizes[-2] / MIB:.0f} MiB; delta in {stored}"
    )
    result: dict[str, float] = {"bytes": sum(sizes), "limit": limit}
    for what in ("make", "apply"):
        found = in_its_own_process(what, folder, stored)
        result |= {f"{what} peak": found["peak"], f"{what} seconds": found["seconds"]}
        print(
            f"{what}: {found['seconds']:.1f} s ({sum(sizes) / found['seconds'] / 1e6:.0f} MB/s), "
            f"resident memory {found['peak'] / MIB:.0f} MiB above the imports (limit "
            f"{limit / MIB:.0f})"
        )
    print(
        f"sums that are not the tuned number: {found['changed']:,.0f} of {found['numbers']:,.0f} "
        f"({100 * found['changed'] / found['numbers']:.3f} %), by {found['largest']:.1e} at most"
    )
    held = sum(path.stat().st_size for path in (folder / "delta").glob("*.safetensors"))
    extra = sum(path.stat().st_size for path in (folder / "delta").glob("*.corrections-*"))
    print(f"delta: {held / 1e9:.2f} GB, of which corrections {extra / 1e9:.3f} GB")
    wrong, total = differing(folder / "tuned", folder / "out")
    print(f"tensors that differ from the tuned model in some bit: {wrong} of {total}")
    return result | {
        "changed": found["changed"], "numbers": found["numbers"], "largest": found["largest"],
        "delta bytes": held, "corrections bytes": extra, "differing": wrong, "tensors": total,
    }  # fmt: skip


def main() -> int:
    """Print the figures; exit status 1 if a bit differs or the limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of one checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--stored", choices=["same", *DTYPES], default="same", help="the delta's")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="a folder for the JSON")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        what, folder, stored = arguments.work
        work(what, Path(folder), stored)
        return 0
    place = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        found = compare(place, arguments.gigabytes, arguments.dtype, arguments.stored)
    finally:
        shutil.rmtree(place)
    if arguments.output is not None:
        options = {"dtype": arguments.dtype, "stored": arguments.stored}
        save_result(arguments.output, "delta", options=options, **found)
    peak = max(found["make peak"], found["apply peak"])
    return int(found["differing"] > 0 or peak > found["limit"])


if __name__ == "__main__":
    sys.exit(main())
