"""A 3 GB checkpoint made 4-bit, killed and resumed: `python -m benchmarks.checkpoint`.

Writes a sharded LLaMA checkpoint of random bfloat16 weights, quantises it in a process of its own
whose anonymous memory is watched, does it again with SIGKILL half way, resumes, and compares every
byte.  The limit: twice the largest tensor and 256 MiB above the process after its imports.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import add_output, keep
from minipeft.measure.machine import allocator_environment

MIB = 2**20


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Anonymous in /proc/self/smaps_rollup")


def write_source(folder: Path, gigabytes: float) -> int:
    """A LLaMA of about this size; returns the bytes of its largest tensor."""
    from transformers import LlamaConfig

    from minipeft.integrations.transformers import meta_model
    from minipeft.io.bitsandbytes.checkpoint import INDEX, index_text
    from minipeft.io.shards import ShardWriter, split

    hidden, intermediate, vocabulary = 2048, 5632, 32000
    layer = 2 * hidden * hidden + 2 * hidden * 256 + 3 * hidden * intermediate
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=vocabulary, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string())
    shapes = {name: tuple(v.shape) for name, v in meta_model(folder).state_dict().items()}
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    files = split(sizes, 10**9)
    torch.manual_seed(0)
    for file, names in files.items():
        with ShardWriter(folder / file, {n: (torch.bfloat16, shapes[n]) for n in names}) as writer:
            for name in names:
                writer.write(name, torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.02))
            writer.finish()
    (folder / INDEX).write_bytes(index_text(files, sizes))
    return max(sizes.values())


def work(source: Path, destination: Path, max_shard_bytes: int) -> None:
    """Quantise, and print the highest anonymous memory above that after the imports."""
    import transformers

    from minipeft.io.bitsandbytes import quantize_checkpoint

    _ = transformers.LlamaForCausalLM  # a lazy import
    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        quantize_checkpoint(source, destination, max_shard_bytes=max_shard_bytes)
    finally:
        done.set()
        watcher.join()
    print(json.dumps({"peak": highest - before, "seconds": time.perf_counter() - start}))


def start_worker(source: Path, destination: Path, max_shard_bytes: int) -> "subprocess.Popen[str]":
    """`work` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--work", str(source),
               str(destination), str(max_shard_bytes)]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, **allocator_environment(), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def finish(process: "subprocess.Popen[str]") -> dict[str, float]:
    """What a worker printed."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the worker ended with {process.returncode}")
    found: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return found


def main() -> int:
    """Print the figures and write them; exit status 1: a byte differs or the limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.work:
        source, destination, size = arguments.work
        work(Path(source), Path(destination), int(size))
        return 0
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        found = compare(folder, arguments.gigabytes)
    finally:
        shutil.rmtree(folder)
    keep(arguments, "checkpoint", gigabytes=arguments.gigabytes, allocator=allocator_environment(),
         **found)  # fmt: skip
    return int(not found["right"])


def compare(folder: Path, gigabytes: float) -> dict[str, Any]:
    """The three runs and what they show; `right`: equal bytes, a kill half way, and the limit."""
    largest = write_source(folder / "source", gigabytes)
    total = sum(path.stat().st_size for path in (folder / "source").glob("*.safetensors"))
    limit = 2 * largest + 256 * MIB
    shard = max(10**6, int(total / 4 / 8))
    print(f"source: {total / 1e9:.2f} GB, largest tensor {largest / MIB:.0f} MiB")
    whole = finish(start_worker(folder / "source", folder / "whole", shard))
    print(
        f"whole run: {whole['seconds']:.1f} s, anonymous memory {whole['peak'] / MIB:.0f} MiB "
        f"above the imports (limit {limit / MIB:.0f})"
    )
    shards = sorted(path.name for path in (folder / "whole").glob("*.safetensors"))
    process = start_worker(folder / "source", folder / "out", shard)
    half = folder / "out.unfinished" / shards[len(shards) // 2 - 1]
    while not half.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted((folder / "out.unfinished").glob("*.safetensors"))
    print(
        f"killed with {len(left)} of {len(shards)} shards whole; destination there: "
        f"{(folder / 'out').exists()}"
    )
    resumed = finish(start_worker(folder / "source", folder / "out", shard))
    a, b = digests(folder / "whole"), digests(folder / "out")
    differing = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    print(
        f"resumed: {resumed['seconds']:.1f} s, anonymous memory {resumed['peak'] / MIB:.0f} MiB; "
        f"files that differ from the whole run: {len(differing)} of {len(a)}"
    )
    size = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
    print(f"result: {size / 1e9:.2f} GB")
    too_much = max(whole["peak"], resumed["peak"]) > limit
    return {
        "source_bytes": total, "result_bytes": size, "largest_tensor": largest, "limit": limit,
        "whole": whole, "resumed": resumed, "shards": len(shards), "shards_at_kill": len(left),
        "files": len(a), "differing": differing,
        "right": not differing and not too_much and 0 < len(left) < len(shards),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
