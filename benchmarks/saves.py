"""Saves killed at every moment, and saves beside each other: `python -m benchmarks.saves`.

Each writer saves over an older state (or into a new folder) in a child that is ended by SIGKILL: at
moments spread evenly over the save, and at each call that changes what is on the disk.  What is
left is loaded: the old state, the new one, or, where there was none, a refusal, after which the
same save must succeed.  Everything else (mixed, lost) is a failure, as is an error of a reader
beside two writers.  Needs a system with fork.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks.output import save_result
from minipeft.io.bitsandbytes import load_quantized, quantize_checkpoint, save_quantized
from minipeft.io.prefixes import load_prefix, save_prefix

# calls that change what is on the disk, or make sure of it
CALLS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "unlink")
State = dict[str, Tensor] | None  # None: what there is was refused


@dataclass
class Writer:
    """A save, what was there before it (None: a new folder), and how to read what is left."""

    name: str
    before: Callable[[Path], object] | None
    save: Callable[[Path], object]
    read: Callable[[Path], State]


def net() -> nn.Sequential:
    """A small model of one's own; the same values every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.Linear(32, 8))


def llama() -> Any:
    """A small model of transformers; the same values every time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model with other numbers in its adapters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model):
            parameter.normal_(std=0.1)
    return model


def adapted(seed: int, rank: int, alpha: float, *, names: tuple[str, ...] = ()) -> nn.Module:
    """`net` with LoRA, and further adapters of these names."""
    model = net()
    mp.inject_lora(model, ["0", "2"], rank=rank, alpha=alpha)
    for name in names:
        mp.inject_lora(model, ["3"], rank=rank + 1, name=name)
    return drawn(model, seed)


def layers_of(model: nn.Module) -> dict[str, Tensor]:
    """All that tells two adapters apart: the factors, scalings, lengths."""
    found = {name: value.detach().clone() for name, value in mp.adapter_state_dict(model).items()}
    for name, module in model.named_modules():
        if hasattr(module, "scaling"):
            found[f"{name}.scaling"] = torch.tensor(module.scaling)
    return found


def read_adapters(folder: Path, *, names: tuple[str, ...] = ()) -> State:
    """What load_peft makes of a folder; None if it refuses all of it, as of a first save."""
    found: dict[str, Tensor] = {}
    refused = 0
    for name in ("default", *names):
        model = net()
        try:
            mp.load_peft(model, folder if name == "default" else folder / name)
        except ValueError:
            refused += 1
        else:
            found |= {f"{name}.{key}": value for key, value in layers_of(model).items()}
    return found if refused == 0 or found else None


def prefixed(seed: int, length: int, *, position: str = "shift", lora: bool = False) -> Any:
    """`llama` with a prefix, and with LoRA under the same name."""
    model = llama()
    if lora:
        mp.inject_lora(model, ["q_proj"], rank=2)
    if length:
        mp.attach_prefix(model, length, position=position)
    return drawn(model, seed)


def read_prefix(folder: Path) -> State:
    """What load_prefix makes of a folder."""
    model = llama()
    try:
        load_prefix(model, folder)
    except ValueError:
        return None
    return layers_of(model)


def read_both(folder: Path) -> State:
    """What both loaders make of a folder that save_pretrained wrote; marked which refused."""
    found: dict[str, Tensor] = {}
    for loader in (mp.load_peft, load_prefix):
        model = llama()
        try:
            loader(model, folder)
        except ValueError:
            continue
        found |= {f"{loader.__name__}.{key}": value for key, value in layers_of(model).items()}
    return found or None


def packed() -> nn.Module:
    """A model in 4 bits."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    mp.quantize_model(model)
    return model


def read_quantized(folder: Path) -> State:
    """What load_quantized makes of a folder."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    try:
        load_quantized(model, folder)
    except ValueError:
        return None
    return model.state_dict()


def write_source(folder: Path) -> None:
    """A 16-bit checkpoint."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).bfloat16()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")


def quantize(source: Path, folder: Path) -> None:
    """quantize_checkpoint into `folder`/out."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    quantize_checkpoint(source, folder / "out", model=model, max_shard_bytes=6000, progress=False)


def writers(source: Path) -> Iterator[Writer]:
    """Every writer, over what it may find."""
    old, new = adapted(1, 4, 4), adapted(2, 4, 16)
    other = adapted(3, 7, 3)
    yield Writer("save_peft, new folder", None, partial(mp.save_peft, new), read_adapters)
    yield Writer("save_peft, same rank", partial(mp.save_peft, old), partial(mp.save_peft, new),
                 read_adapters)  # fmt: skip
    yield Writer("save_peft, another rank", partial(mp.save_peft, old),
                 partial(mp.save_peft, other), read_adapters)  # fmt: skip
    two = [adapted(seed, 4, alpha, names=("poet",)) for seed, alpha in ((4, 4), (5, 16))]
    read_two = partial(read_adapters, names=("poet",))
    yield Writer("save_peft, two adapters", partial(mp.save_peft, two[0]),
                 partial(mp.save_peft, two[1]), read_two)  # fmt: skip
    short, long = prefixed(6, 3), prefixed(7, 5, position="none")
    yield Writer("save_prefix", partial(save_prefix, short), partial(save_prefix, long),
                 read_prefix)  # fmt: skip
    both, lora = prefixed(8, 3, position="none", lora=True), prefixed(9, 0, lora=True)
    yield Writer("save_pretrained", both.save_pretrained, lora.save_pretrained, read_both)
    yield Writer("save_quantized", None, partial(save_quantized, packed(), max_shard_bytes=6000),
                 read_quantized)  # fmt: skip
    yield Writer("quantize_checkpoint", None, partial(quantize, source),
                 lambda folder: read_quantized(folder / "out"))  # fmt: skip


def same(a: State, b: State) -> bool:
    """Whether two states are one, to the bit."""
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def in_child(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run in a fork; the signal that ended it, or 0.  `kill_after`: seconds from its start."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(told, b"!")
            work()
            status = 0
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
        finally:
            os._exit(status)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("a save failed that nobody disturbed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying_at(call: int, work: Callable[[], object]) -> Callable[[], object]:
    """The same work in a process that dies before the `call`-th of CALLS."""

    def run() -> object:
        left = call

        def counted(own: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **keywords: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*args, **keywords)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        return work()

    return run


class Trial:
    """One writer's folder, made as it was before each attempt, and what was found in it."""

    def __init__(self, writer: Writer, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        self.counts: Counter[str] = Counter()
        self.old = self.state_after(writer.before)
        self.new = self.state_after(writer.save)
        if same(self.old, self.new) or self.new is None:
            raise RuntimeError(f"{writer.name}: old and new cannot be told apart")

    def state_after(self, save: Callable[[Path], object] | None) -> State:
        """What is read after a save that nobody disturbs into a new folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if save is None:
            return None
        self.folder.mkdir()
        save(self.folder)
        return self.writer.read(self.folder)

    def reset(self) -> None:
        """The folder as it was before the save."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if self.writer.before is not None:
            self.writer.before(self.folder)

    def look(self) -> None:
        """Count what a dead save has left; then save again, which must leave the new state."""
        found = self.writer.read(self.folder)
        if same(found, self.new):
            outcome = "new"
        elif same(found, self.old):
            outcome = "old" if self.old is not None else "refused"
        else:
            outcome = "lost" if found is None else "mixed"
        if outcome != "new" or self.writer.name != "save_quantized":  # that one never overwrites
            try:
                self.writer.save(self.folder)
            except (ValueError, OSError) as error:
                # quantize_checkpoint refuses what is whole, which is as it should be
                if outcome != "new" or "exists already" not in str(error):
                    print(f"{self.writer.name}: {error}", file=sys.stderr)
                    outcome = "not saved again"
        if not same(self.writer.read(self.folder), self.new):
            outcome = "wrong after the next save"
        left = [p.name for p in self.folder.rglob("*") if p.name.startswith(".minipeft")
                or p.suffix == ".tmp"]  # fmt: skip
        if left and outcome != "new":  # a whole new state need not be saved again
            outcome = "not cleaned"
        self.counts[outcome] += 1

    def times(self) -> float:
        """Seconds that a save takes, the median of five."""
        found = []
        for _ in range(5):
            self.reset()
            start = time.perf_counter()
            in_child(lambda: self.writer.save(self.folder))
            found.append(time.perf_counter() - start)
        return median(found)

    def kill(self, count: int) -> None:
        """Die at `count` moments, and at every call that changes the disk."""
        seconds = self.times()
        for number in range(count):
            self.reset()
            in_child(lambda: self.writer.save(self.folder),
                     kill_after=seconds * (number + 0.5) / count)  # fmt: skip
            self.look()

    def at_calls(self, step: int = 1) -> int:
        """Die before each `step`-th call that changes the disk; returns how many there are."""
        for call in range(1, 1000, step):
            self.reset()
            if in_child(dying_at(call, lambda: self.writer.save(self.folder))) == 0:
                return call - 1
            self.look()
        raise RuntimeError(f"{self.writer.name}: no end")


def beside(folder: Path, seconds: float, *, threads: bool) -> Counter[str]:
    """Two writers of two states and a reader of the same folder, all at once."""
    models = [adapted(1, 4, 4), adapted(2, 7, 16)]
    states: list[State] = []
    for model in models:
        mp.save_peft(model, folder)
        states.append(read_adapters(folder))
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def write(model: nn.Module) -> None:
        while time.monotonic() < end:
            mp.save_peft(model, folder)

    def in_thread(model: nn.Module) -> None:
        try:
            write(model)
        except BaseException as error:
            print(f"writer: {error!r}", file=sys.stderr)
            counts["errors"] += 1

    children, running = [], []
    for model in models:
        if threads:
            running.append(threading.Thread(target=in_thread, args=(model,)))
            running[-1].start()
        elif (child := os.fork()) == 0:
            status = 1
            try:
                write(model)
                status = 0
            except BaseException as error:
                print(f"writer: {error!r}", file=sys.stderr)
            finally:
                os._exit(status)
        else:
            children.append(child)
    while time.monotonic() < end:
        model = net()
        try:
            mp.load_peft(model, folder)
        except (ValueError, OSError) as error:
            print(f"reader: {error}", file=sys.stderr)
            counts["errors"] += 1
            continue
        found = {f"default.{key}": value for key, value in layers_of(model).items()}
        counts["right" if any(same(found, state) for state in states) else "wrong"] += 1
    for thread in running:
        thread.join()
    for child in children:
        if os.waitpid(child, 0)[1] != 0:
            counts["errors"] += 1
    if left := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
        print(f"left over: {left}", file=sys.stderr)
        counts["errors"] += 1
    return counts


GOOD = {"old", "new", "refused", "right"}


def run(folder: Path, kills: int, step: int, seconds: float) -> dict[str, Counter[str]]:
    """Everything, in a folder; counts of what was found by writer.

    `kills` moments for each writer, and each `step`-th call (0: none).
    """
    torch.set_num_threads(1)  # forks of a process with threads hang
    source, found = folder / "source", dict[str, Counter[str]]()
    write_source(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        for writer in writers(source):
            trial = Trial(writer, folder / "case")
            if kills:
                trial.kill(kills)
            if step:
                trial.at_calls(step)
            found[writer.name] = trial.counts
            print(f"{writer.name:26} {dict(sorted(trial.counts.items()))}", flush=True)
        for threads in (False, True):
            if not seconds:
                break
            (place := folder / f"beside{threads}").mkdir()
            name = f"two {'threads' if threads else 'processes'} and a reader"
            found[name] = beside(place, seconds, threads=threads)
            print(f"{name:26} {dict(sorted(found[name].items()))}", flush=True)
    return found


def main() -> int:
    """Print what was found; exit status 1 if a state was mixed, lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each writer, spread over a save")
    parser.add_argument("--calls", type=int, default=1, help="die at each so-many-th call; 0: none")
    parser.add_argument("--seconds", type=float, default=5.0, help="of writers beside a reader")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--print-only", action="store_true", help="write no file of results")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        found = run(folder, arguments.kills, arguments.calls, arguments.seconds)
    finally:
        shutil.rmtree(folder)
    if not arguments.print_only:
        save_result(arguments.output, "saves", kills=arguments.kills, found=found)
    return int(any(outcome not in GOOD for counts in found.values() for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
