"""A process for each run, so that none inherits memory or caches of another, in rounds.

Rounds A B C A B C let the drift of a shared machine hit all methods alike, and a ratio is taken
within a round.  Processes are spawned, never forked, on every system.
"""

import dis
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from minipeft.measure.gate import GateError
from minipeft.measure.loss import LossError
from minipeft.measure.machine import allocator_environment
from minipeft.measure.methods import Unsupported
from minipeft.measure.run import Case, run

Result = dict[str, Any]
# "start", "step", "warning" or "end", and what is known of it
Event = Callable[[str, Result], None]
CHILD = "MINIPEFT_BENCHMARK_CHILD"  # set in the processes that run a method
LINES = 3  # of a dead process's last words
END_SECONDS = 120  # that a process may take to end after its result, on a busy machine too
REFUSALS = (ValueError, TypeError, NotImplementedError)


def packed(name: str, case: Case) -> bytes:
    """The case of the method `name` as another process gets it.

    Raises:
        ValueError: a function that another process cannot import.
    """
    functions = {
        "make_model": case.make_model, "make_batch": case.make_batch, "loss": case.loss,
        "after": case.after, f"the method {name!r}": case.method.prepare,
    }  # fmt: skip
    for what, function in functions.items():
        module = getattr(function, "__module__", "")
        if module == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise ValueError(
                f"benchmark: {what} was typed into a session, and each method runs in a process of "
                "its own, which cannot import it; put it into a file"
            )
        _pickled(what, function)
    for what, value in case.settings.items():
        _pickled(what, value)
    return pickle.dumps(case)


def _pickled(what: str, value: object) -> None:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"benchmark: each method runs in a process of its own, which must be able to import "
            f"{what}: give a function at the top of a module or script, or a functools.partial of "
            f"one; a lambda and a function inside a function are not ({error})"
        ) from error


def refused_by_us(error: Exception) -> bool:
    """Whether minipeft says with `raise` that it does not do this.

    An error that Python or torch raises inside minipeft is none of its refusals, nor is one of the
    measurement itself.
    """
    if not isinstance(error, REFUSALS):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    package, _, rest = last.tb_frame.f_globals.get("__name__", "").partition(".")
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    own = package in ("minipeft", "minipeft_kernels") and rest.partition(".")[0] != "measure"
    return own and raised


def _child(connection: Any, case: bytes, errors: str) -> None:
    """What the process does: the run, and how it ended, to the other end of the connection."""
    with open(errors, "a") as file:
        os.dup2(file.fileno(), 2)

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        connection.send(("warning", {"category": category.__name__, "text": str(message)}))

    warnings.showwarning = show
    result: Result
    try:
        found: Case = pickle.loads(case)  # written by this program, a moment ago
        result = run(found, lambda values: connection.send(("step", values)))
    except GateError as error:
        result = {"failed": f"gate: {error}"}
    except LossError as error:
        result = {"failed": str(error), "for_every_method": True}
    except Unsupported as error:
        result = {"unsupported": str(error)}
    except (MemoryError, torch.OutOfMemoryError):
        result = {"failed": "out of memory", "traceback": traceback.format_exc()}
    except Exception as error:
        if refused_by_us(error):
            result = {"unsupported": str(error)}
        else:
            words = f"{type(error).__name__}: {error}"
            result = {"failed": words, "traceback": traceback.format_exc()}
    connection.send(("result", result))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that a process started now gets."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_a_process(
    case: Case, on_event: Event, *, name: str = "mine", environment: Mapping[str, str] | None = None
) -> Result:
    """The run in a process of its own; what happened to it, if it did not end well.

    `environment` are variables that the process gets beside this one's.  The result says them as
    "allocator", and its "warnings" are those of the process, each once.  The process may have
    children of its own, as a DataLoader's workers.
    """
    context = multiprocessing.get_context("spawn")
    content = packed(name, case)
    more = dict(environment or {})
    heard: list[Result] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = Path(folder) / "errors.txt"
        errors.touch()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, content, str(errors)))
        with _environment({CHILD: "1", **more}):
            process.start()
        theirs.close()
        try:
            result = _listen(process, ours, on_event, heard)
        except BaseException:  # Ctrl-C too: nothing is left running
            process.kill()
            raise
        finally:
            process.join(END_SECONDS)
            if stays := process.is_alive():
                process.kill()
                process.join()
            ours.close()
        if result is None:
            result = {"failed": _last_words(process.exitcode, errors)}
        elif stays:
            text = f"its process did not end within {END_SECONDS} s of its result, and was ended"
            heard.append({"category": "RuntimeWarning", "text": text})
            on_event("warning", heard[-1])
        return {**result, "allocator": more, "warnings": [
            f"{one['category']}: {one['text']}" for one in heard
        ]}  # fmt: skip


def _listen(process: Any, ours: Any, on_event: Event, heard: list[Result]) -> Result | None:
    """What the process says until its result; None where it dies without one.

    Its children may hold the other end of the connection open after its death, so that is watched.
    """
    while True:
        wait([ours, process.sentinel])
        if not ours.poll():
            return None
        try:
            kind, values = ours.recv()
        except EOFError:
            return None
        if kind == "result":
            found: Result = values
            return found
        if kind == "warning":
            if values in heard:
                continue
            heard.append(values)
        on_event(kind, values)


def _last_words(status: int | None, errors: Path) -> str:
    if status == -9:
        return "killed (out of memory?)"
    said = errors.read_text(errors="replace").strip().splitlines()[-LINES:]
    return f"exit status {status}: {' | '.join(said) or 'it said nothing'}"


def rounds_of(
    cases: Mapping[str, Case], rounds: int, later_steps: int, on_event: Event
) -> list[Result]:
    """Every case in every round; the first has all steps and what comes after them, others few.

    The first round measures memory, with the allocator's setting (`allocator_environment`); it
    makes steps slower, so the later ones run without it and measure time.  A case that gave no
    figures is not tried again.

    Raises:
        ValueError: the loss of the untouched model is none that can be trained on.
    """
    runs: list[Result] = []
    stopped: set[str] = set()
    for number in range(rounds):
        for name, case in cases.items():
            if name in stopped:
                continue
            if number:
                case = replace(case, steps=later_steps, after=None, flops=False)

            def tell(kind: str, values: Result, name: str = name, number: int = number) -> None:
                on_event(kind, {"method": name, "round": number, **values})

            tell("start", {})
            result = in_a_process(
                case, tell, name=name, environment={} if number else allocator_environment()
            )
            tell("end", {"result": result})
            if result.pop("for_every_method", False):
                raise ValueError(f"benchmark: {result['failed']}")
            runs.append({"method": name, "round": number, **result})
            if "step_seconds" not in result:
                stopped.add(name)
    return runs
