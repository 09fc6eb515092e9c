"""One QLoRA step of models that are larger than the memory it takes: `--case 2gb`, `30b`, `65b`.

A checkpoint of the shape of a LLaMA is written with random codes (nothing is quantised), its pages
are dropped from the system's cache, and a process of its own maps it and trains one step: forward,
backward with gradient checkpointing, AdamW.  Disk and memory are asked before anything is written,
and the files are removed at the end.

Anonymous memory is what the process itself takes (RssAnon); pages of the mapped files are the
system's cache, which it drops when others want memory.  Both are sampled every 20 ms from outside.
The limit is enforced by RLIMIT_DATA, set to it plus what counts there and takes no memory: the size
of the mapped files (they could be written) and what the imports have reserved and not touched.
MALLOC_MMAP_THRESHOLD_=65536 lets the allocator give memory back, so that a peak is what is held and
not what was once held.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import enable_checkpointing
from benchmarks.output import save_result
from minipeft.adapters.progress import Progress
from minipeft.io.bitsandbytes import checkpoint
from minipeft.io.bitsandbytes.weight import Settings, entries, specs
from minipeft.io.header import Spec, nbytes
from minipeft.io.shards import ShardWriter, split
from minipeft.measure.machine import allocator_environment
from minipeft.qlora import NF4Linear

RESULTS = Path(__file__).parent / "results"
SHARD_BYTES = 4 * 10**9
LINEAR = {
    "self_attn.q_proj": "hh", "self_attn.k_proj": "hh", "self_attn.v_proj": "hh",
    "self_attn.o_proj": "hh", "mlp.gate_proj": "ih", "mlp.up_proj": "ih", "mlp.down_proj": "hi",
}  # fmt: skip


class Case(NamedTuple):
    """Sizes of a LLaMA, and how much memory its step may take."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    limit: float  # GB of anonymous memory
    vocabulary: int = 32000


CASES = {
    "tiny": Case(2, 256, 704, 4, 2, 512),
    "2gb": Case(15, 4096, 11008, 32, 0.7),
    "30b": Case(60, 6656, 17920, 52, 22),
    "65b": Case(80, 8192, 22016, 64, 12),
}


def config_of(case: Case) -> dict[str, Any]:
    """config.json, as transformers reads it."""
    four = checkpoint.quantization_config(
        quant_type="nf4", double_quant=True, dense=["lm_head"], compute_dtype=torch.bfloat16
    )
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": case.hidden, "intermediate_size": case.intermediate,
        "num_hidden_layers": case.layers, "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads, "vocab_size": case.vocabulary,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "quantization_config": four,
    }  # fmt: skip


def weights_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in the order of the layers."""
    size = {"h": case.hidden, "i": case.intermediate}
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (case.vocabulary, case.hidden)
    }
    for layer in range(case.layers):
        before = f"model.layers.{layer}"
        for name, (out, into) in LINEAR.items():
            found[f"{before}.{name}.weight"] = (size[out], size[into])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{before}.{norm}.weight"] = (case.hidden,)
    found["model.norm.weight"] = (case.hidden,)
    return {**found, "lm_head.weight": (case.vocabulary, case.hidden)}


def is_coded(name: str) -> bool:
    """Whether a weight of these models is in 4 bits."""
    return name.endswith("_proj.weight")


def specs_of(name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """The tensors that a weight is in the file."""
    if not is_coded(name):
        return {name: (torch.bfloat16, shape)}
    return specs(name, Settings(shape, torch.bfloat16, 64))


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Random codes with scales near 1 / sqrt(inputs), or random numbers of that size."""
    if len(shape) == 1:
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    scale = shape[1] ** -0.5
    if not is_coded(name):
        values = torch.empty(shape, dtype=torch.bfloat16)
        for rows in values.split(1024):
            rows.copy_(torch.from_numpy(rng.standard_normal(rows.shape, np.float32) * scale))
        return {name: values}
    layer = NF4Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    state = {own: _bytes(rng, p.numel()) for own, p in layer.packed_parameters().items()}
    groups = state["absmax_scale"].numel() // 4
    state["absmax_scale"] = torch.full((groups,), scale / 2)
    state["absmax_offset"] = torch.tensor([scale])
    layer.fill(state)
    return entries(name, layer)


def _bytes(rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(rng.bytes(count)), dtype=np.uint8))


def write(case: Case, folder: Path, seed: int) -> int:
    """Write the checkpoint; returns its bytes."""
    weights = weights_of(case)
    groups = {name: specs_of(name, shape) for name, shape in weights.items()}
    sizes = {name: sum(map(nbytes, group.values())) for name, group in groups.items()}
    files = split(sizes, SHARD_BYTES)
    rng = np.random.default_rng(seed)
    total = sum(sizes.values())
    with Progress(total=total, desc="writing", unit="B", unit_scale=True) as bar:
        for file, names in files.items():
            own = {key: spec for name in names for key, spec in groups[name].items()}
            with ShardWriter(folder / file, own) as shard:
                for name in names:
                    for key, value in random_weight(rng, name, weights[name]).items():
                        shard.write(key, value)
                    bar.update(sizes[name])
                shard.finish()
            drop_from_cache(folder / file)
    if len(files) > 1:
        inside = {file: [key for name in names for key in groups[name]]
                  for file, names in files.items()}  # fmt: skip
        each = {key: nbytes(spec) for group in groups.values() for key, spec in group.items()}
        (folder / checkpoint.INDEX).write_bytes(checkpoint.index_text(inside, each))
    (folder / checkpoint.CONFIG).write_bytes(checkpoint.config_text(config_of(case)))
    return sum(path.stat().st_size for path in folder.iterdir())


def drop_from_cache(path: Path) -> None:
    """Let the system forget the pages of a file, so that it is read from the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)


def field(pid: int | str, name: str, file: str = "status") -> int:
    """A number of /proc/PID/status (in bytes) or of /proc/PID/io."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(f"{name}:"):
            words = line.split()
            return int(words[1]) * (1024 if words[-1] == "kB" else 1)
    raise OSError(f"no {name} in /proc/{pid}/{file}")


def memory_available() -> int:
    """Bytes that a new process can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def step(options: dict[str, Any]) -> dict[str, Any]:
    """Load and train one step, in this process; what it took."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (before memory is counted)

    import minipeft as mp

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    imports = field("self", "RssAnon")
    if options["limit_bytes"]:
        limit = options["limit_bytes"] + options["disk_bytes"] + field("self", "VmData") - imports
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.manual_seed(options["seed"])
    took: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        took[name], clock = round(now - clock, 2), now
        print("done", name, flush=True)

    model: Any = mp.meta_model(options["folder"])
    mp.inject_qlora(model, "all-linear", options["rank"])
    mp.load_quantized(model, options["folder"], mapped=options["mapped"], progress=False)
    lap("load")
    model.train()
    enable_checkpointing(model)
    optimizer = torch.optim.AdamW(list(mp.adapter_parameters(model)), lr=1e-4, foreach=False)
    ids = torch.randint(model.config.vocab_size, (1, options["tokens"]))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    lap("forward")
    loss.backward()
    lap("backward")
    mp.check_gradients(model)
    optimizer.step()
    lap("optimizer")
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss is {loss.item()}")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": took, "loss": loss.item(), "anonymous_after_imports": imports,
        "trainable": mp.count_parameters(model).trainable,
        "weights": mp.count_parameters(model).total, "major_faults": usage.ru_majflt,
        "bytes_read": field("self", "read_bytes", "io"),
    }  # fmt: skip


def watched(options: dict[str, Any]) -> dict[str, Any]:
    """Run `step` in a process of its own, and sample its memory."""
    environment = {**os.environ, **allocator_environment(), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.larger_than_memory", "--worker",
               json.dumps(options)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            try:
                for name in peaks:
                    peaks[name] = max(peaks[name], field(process.pid, name))
            except OSError:
                return

    thread = threading.Thread(target=sample)
    thread.start()
    result: dict[str, Any] = {}
    try:
        assert process.stdout is not None
        for line in Progress(process.stdout, desc="one step", unit="part", total=5):
            if line.startswith("result "):
                result = json.loads(line[7:])
        if process.wait():
            raise ValueError(f"the step ended with {process.returncode}")
    finally:
        over.set()
        thread.join()
        if process.poll() is None:
            process.kill()
            process.wait()
    peak = {f"peak_{name}": value for name, value in peaks.items()}
    return {**result, **peak}


def check_room(name: str, case: Case, folder: Path, limit: float) -> int:
    """Raise ValueError unless disk and memory suffice; the bytes of the checkpoint."""
    sizes = (specs_of(n, s) for n, s in weights_of(case).items())
    wanted = sum(nbytes(spec) for own in sizes for spec in own.values())
    free, memory = shutil.disk_usage(folder).free, memory_available()
    if free < 1.02 * wanted + 10**9:
        raise ValueError(
            f"{name}: takes {wanted / 1e9:.1f} GB of disk and 1 GB to spare; {folder} has "
            f"{free / 1e9:.1f}: choose another --folder"
        )
    if memory < limit * 1e9:
        raise ValueError(
            f"{name}: may take {limit:g} GB of memory, and {memory / 1e9:.1f} are free; end other "
            "programs, or lower --limit"
        )
    return wanted


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case."""
    case = CASES[name]
    limit = case.limit if arguments.limit is None else arguments.limit
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = check_room(name, case, arguments.folder, limit)
    print(f"{name}: {wanted / 1e9:.1f} GB on disk, at most {limit:g} GB of memory", flush=True)
    folder = arguments.folder / f"llama-{name}"
    there = (folder / checkpoint.CONFIG).is_file()
    folder.mkdir(exist_ok=True)
    start = time.perf_counter()
    try:
        if not there:
            write(case, folder, arguments.seed)
        disk = sum(path.stat().st_size for path in folder.iterdir())
        for path in folder.glob("*.safetensors"):
            drop_from_cache(path)
        writing = time.perf_counter() - start
        options = {
            "folder": str(folder), "rank": arguments.rank, "tokens": arguments.tokens,
            "seed": arguments.seed, "threads": arguments.threads, "mapped": arguments.mapped,
            "disk_bytes": disk, "limit_bytes": int(limit * 1e9) if arguments.enforce else 0,
        }  # fmt: skip
        found = watched(options)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    found |= {"case": name, "sizes": case._asdict(), "disk_bytes": disk, "limit_gb": limit,
              "seconds_writing": round(writing, 1), "enforced": arguments.enforce,
              "inside": found["peak_RssAnon"] <= limit * 1e9}  # fmt: skip
    show(found)
    return found


def show(found: dict[str, Any]) -> None:
    """The figures of a case, in words."""
    gb = {key: found[key] / 1e9 for key in ("peak_RssAnon", "peak_VmRSS", "disk_bytes",
                                            "bytes_read", "anonymous_after_imports")}  # fmt: skip
    took = found["seconds"]
    print(
        f"{found['case']}: {found['weights'] / 1e9:.1f} G weights, {gb['disk_bytes']:.2f} GB on "
        f"disk; peak of anonymous memory {gb['peak_RssAnon']:.2f} GB (limit "
        f"{found['limit_gb']:g}; {gb['anonymous_after_imports']:.2f} after the imports), resident "
        f"with pages of files {gb['peak_VmRSS']:.2f} GB; {sum(took.values()):.0f} s ("
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in took.items())
        + f"), {gb['bytes_read']:.1f} GB read; loss {found['loss']:.3f}",
        flush=True,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m benchmarks.larger_than_memory", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    main.add_argument("--case", nargs="+", choices=list(CASES), default=["2gb"])
    main.add_argument("--folder", type=Path, required=False, help="where the files are written")
    main.add_argument("--keep", action="store_true", help="leave the files there")
    main.add_argument("--limit", type=float, default=None, help="GB of anonymous memory")
    main.add_argument("--enforce", action=argparse.BooleanOptionalAction, default=True,
                      help="the limit, by RLIMIT_DATA")  # fmt: skip
    main.add_argument("--mapped", action=argparse.BooleanOptionalAction, default=True)
    main.add_argument("--rank", type=int, default=16)
    main.add_argument("--tokens", type=int, default=32)
    main.add_argument("--threads", type=int, default=None)
    main.add_argument("--seed", type=int, default=0)
    main.add_argument("--output", type=Path, default=RESULTS)
    main.add_argument("--worker", help=argparse.SUPPRESS)
    return main


def main() -> int:
    """Parse and run."""
    arguments = parser().parse_args()
    if arguments.worker:
        print("result", json.dumps(step(json.loads(arguments.worker))), flush=True)
        return 0
    try:
        if arguments.folder is None:
            raise ValueError("--folder: name a folder with room for the files")
        runs = [run(name, arguments) for name in arguments.case]
    except (ImportError, ValueError, OSError) as error:
        print(f"larger_than_memory: {error}", file=sys.stderr)
        return 2
    words = ["FOLDER" if word == str(arguments.folder) else word for word in sys.argv[1:]]
    command = " ".join(["python -m benchmarks.larger_than_memory", *words])
    save_result(arguments.output, "larger_than_memory", command=command, runs=runs)
    return 0 if all(found["inside"] for found in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
