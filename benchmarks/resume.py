"""Training that dies and goes on, beside training that does not: `python -m benchmarks.resume`.

Trainer: for each method a process trains six steps and saves after the third; it is ended by
SIGKILL in the fifth, and another process goes on from the checkpoint.  What is printed is the
largest difference of adapter tensors, of the optimiser's moments and of the losses to a run that
nobody ended, and that of the best model at the end to the checkpoint that it is.

A loop of one's own saves its state after every step; it is ended by SIGKILL at a random moment and
started again, fifty times.  After each, the state that is there must be one that the undisturbed
run had after the same step, in every bit, and so must the end.  Needs a system with fork.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from benchmarks.output import save_result
from benchmarks.saves import in_child

STEPS, SAVED, DIES = 6, 3, 5


def base() -> Any:
    """A small model of transformers; the same values every time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _lora(**options: Any) -> Any:
    model = base()
    mp.inject_lora(model, "all-linear", 4, **{"dropout": 0.1, **options})
    return model


def _qlora() -> Any:
    model = base()
    mp.inject_qlora(model, "all-linear", 4, dropout=0.1)
    return model


def _prefix(**options: Any) -> Any:
    model = base()
    mp.attach_prefix(model, 4, **options)
    return model


def _two() -> Any:
    model = _lora()
    mp.inject_lora(model, ["q_proj", "v_proj"], 2, name="second")
    return model


def _head() -> Any:
    model = _lora()
    mp.train_modules(model, ["lm_head"])
    return model


METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": _lora,
    "DoRA": lambda: _lora(dora=True),
    "QLoRA": _qlora,
    "PiSSA": lambda: _lora(init=mp.starts.pissa()),
    "prefix": _prefix,
    "prefix with MLP": lambda: _prefix(hidden=16, dropout=0.1),
    "two adapters": _two,
    "LoRA and a head": _head,
}


def trainer(model: Any, folder: Path, *, best: bool = False, dies: bool = False) -> Any:
    """A Trainer over six steps, which saves after the third.

    `best`: it loads its best model at the end; the metric says that this is the one after the
    third.  `dies`: it is ended by SIGKILL in the fifth.
    """
    import transformers

    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": row, "labels": row}
            for row in torch.randint(3, 100, (12, 10), generator=generator)]  # fmt: skip
    options: dict[str, Any] = {}
    if best:
        options = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True,
                   "metric_for_best_model": "age", "greater_is_better": False}  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_steps=SAVED, logging_steps=1, **options,
    )  # fmt: skip

    class Ends(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if dies and state.global_step == DIES - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    asked = 0

    def age(_: Any) -> dict[str, float]:
        nonlocal asked
        asked += 1
        return {"age": float(asked)}

    made = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=[Ends()],
        eval_dataset=rows[:2], compute_metrics=age if best else None,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


def tensors_of(found: Any, place: str = "") -> dict[str, Tensor]:
    """The tensors in nested dicts and lists, by their places."""
    if isinstance(found, Tensor):
        return {place: found}
    parts = found.items() if isinstance(found, dict) else enumerate(found) \
        if isinstance(found, list | tuple) else ()  # fmt: skip
    result: dict[str, Tensor] = {}
    for key, value in parts:
        result |= tensors_of(value, f"{place}/{key}")
    return result


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of tensors; infinite if they are not of the same names."""
    if a.keys() != b.keys() or not a:
        return float("inf")
    pairs = [(value.double(), b[name].double()) for name, value in a.items()]
    return max(float((x - y).abs().max()) for x, y in pairs)


def losses(found: Any) -> list[float]:
    """The loss of each step that a Trainer wrote down."""
    return [entry["loss"] for entry in found.state.log_history if "loss" in entry]


def differences(one: Any, other: Any) -> dict[str, float]:
    """The largest differences of two Trainers that are done."""
    adapters = [mp.adapter_state_dict(each.model) for each in (one, other)]
    moments = [tensors_of(each.optimizer.state_dict()) for each in (one, other)]
    a, b = losses(one), losses(other)
    off = max(abs(x - y) for x, y in zip(a, b, strict=True)) if len(a) == len(b) == STEPS \
        else float("inf")  # fmt: skip
    return {"adapters": farthest(*adapters), "moments": farthest(*moments), "losses": off}


def resume_trainer(method: str, folder: Path) -> dict[str, float]:
    """Six steps at once, against three, a kill and three more; and the best model."""
    from safetensors.torch import load_file

    make = METHODS[method]
    whole = trainer(make(), folder / "whole")
    whole.train()
    if in_child(lambda: trainer(make(), folder / "dies", dies=True).train()) != signal.SIGKILL:
        raise RuntimeError(f"{method}: the run was not ended")
    checkpoint = folder / "dies" / f"checkpoint-{SAVED}"
    again = trainer(make(), folder / "dies")
    again.train(resume_from_checkpoint=str(checkpoint))
    found = differences(whole, again)
    best = trainer(make(), folder / "best", best=True)
    best.train()
    chosen = Path(best.state.best_model_checkpoint)
    if chosen.name != f"checkpoint-{SAVED}":
        raise RuntimeError(f"{method}: the best model is {chosen.name}")
    saved, state = load_file(chosen / "model.safetensors"), best.model.state_dict()
    return found | {"best": farthest(saved, {name: state[name] for name in saved})}


class Loop:
    """A loop of one's own: QLoRA with dropout, AdamW, a cosine, data from torch's generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        mp.quantize_model(self.model, head=())
        mp.inject_lora(self.model, ["0", "2"], rank=4, dropout=0.1)
        self.optimizer = torch.optim.AdamW(mp.adapter_parameters(self.model), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 500)
        self.step = 0

    def train(self) -> None:
        """One step."""
        x = torch.randn(8, 64) * random.random()
        self.optimizer.zero_grad()
        (self.model(x) - x).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def save(self, folder: Path) -> None:
        """The state after this step."""
        mp.save_training_state(
            folder, self.model, self.optimizer, step=self.step, scheduler=self.scheduler
        )

    def load(self, folder: Path) -> bool:
        """Go on from the state that is there; False where there is none yet."""
        try:
            self.step = mp.load_training_state(
                folder, self.model, self.optimizer, scheduler=self.scheduler
            )
        except ValueError as error:
            if "no such file" not in str(error):
                raise
            return False
        return True

    def state(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        found = tensors_of(self.optimizer.state_dict(), "moments")
        found |= mp.adapter_state_dict(self.model)
        found["torch"], found["python"] = torch.get_rng_state(), torch.tensor(random.getstate()[1])
        found["rate"] = torch.tensor(self.scheduler.get_last_lr(), dtype=torch.float64)
        return {name: value.clone() for name, value in found.items()}


def run_loop(folder: Path, steps: int) -> None:
    """What the user's program does: go on from what is there, save after every step."""
    loop = Loop()  # here, and not before a fork: Python seeds its generator anew in a child
    loop.load(folder)
    while loop.step < steps:
        loop.train()
        loop.save(folder)


def kill_loop(folder: Path, kills: int, seconds: float, seed: int) -> Counter[str]:
    """Die `kills` times, each within `seconds` of the start; what was there after each."""
    draw, counts = random.Random(seed), Counter[str]()
    run_loop(folder.with_name("warm"), 2)  # what is imported late is imported before the forks
    undisturbed = Loop()
    known = {0: undisturbed.state()}

    def expected(step: int) -> dict[str, Tensor]:
        while undisturbed.step < step:  # it draws from the generators that a load sets
            torch.set_rng_state(known[undisturbed.step]["torch"])
            random.setstate((3, tuple(known[undisturbed.step]["python"].tolist()), None))
            undisturbed.train()
            known[undisturbed.step] = undisturbed.state()
        return known[step]

    ahead = 10**9
    while counts.total() < kills:
        in_child(partial(run_loop, folder, ahead), kill_after=draw.uniform(0, seconds))
        found = Loop()
        try:
            there = found.load(folder)
        except ValueError as error:
            print(f"after a kill: {error}", file=sys.stderr)
            counts["not whole"] += 1
            continue
        state = found.state()
        if not there:
            counts["nothing yet"] += 1
        else:
            right = farthest(state, expected(found.step)) == 0
            counts["as undisturbed" if right else "wrong"] += 1
    last = Loop()
    last.load(folder)
    end = last.step + 3
    run_loop(folder, end)
    last.load(folder)
    state = last.state()
    counts["end as undisturbed" if farthest(state, expected(end)) == 0 else "wrong end"] += 1
    print(f"{end} steps in all", flush=True)
    return counts


GOOD = {"nothing yet", "as undisturbed", "end as undisturbed"}


def run(folder: Path, kills: int, methods: list[str], seconds: float) -> dict[str, Any]:
    """Everything, in a folder."""
    torch.set_num_threads(1)  # forks of a process with threads hang
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Trainer's; Python's of forks beside threads
        for method in methods:
            found[method] = resume_trainer(method, folder / method.replace(" ", "-"))
            text = ", ".join(f"{name} {value:g}" for name, value in found[method].items())
            print(f"{method:16} {text}", flush=True)
        if kills:
            counts = kill_loop(folder / "loop", kills, seconds, seed=0)
            found["kills"] = dict(sorted(counts.items()))
            print(f"{'own loop, killed':16} {found['kills']}", flush=True)
    return found


def main() -> int:
    """Print what was found; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.6, help="a killed loop lives at most so")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--print-only", action="store_true", help="write no file of results")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(tempfile.mkdtemp())
    try:
        found = run(folder, arguments.kills, arguments.methods, arguments.seconds)
    finally:
        shutil.rmtree(folder)
    if not arguments.print_only:
        save_result(arguments.output, "resume", kills=arguments.kills, found=found)
    counts = found.pop("kills", {})
    far = [method for method, values in found.items() if max(values.values()) > 0]
    return int(bool(far) or any(outcome not in GOOD for outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
