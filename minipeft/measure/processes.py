"""A process for each run, so that none inherits memory or caches of another, in rounds.

Rounds A B C A B C let the drift of a shared machine hit all methods alike, and a ratio is taken
within a round.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import IO, Any

import torch

from minipeft.measure.run import Case, GateError, Unsupported, run

Result = dict[str, Any]
Event = Callable[[str, Result], None]  # "start", "step" or "end", and what is known of it
CHILD = "MINIPEFT_BENCHMARK_CHILD"  # set in the processes that run a method
LINES = 3  # of a dead process's last words


def packed(case: Case) -> bytes:
    """The case as another process gets it.

    Raises:
        ValueError: a function that another process cannot import.
    """
    for what, function in (("make_model", case.make_model), ("make_batch", case.make_batch),
                           ("loss", case.loss)):  # fmt: skip
        module = getattr(function, "__module__", "")
        if module == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise ValueError(
                f"benchmark: {what} was typed into a session, and each method runs in a process of "
                "its own, which cannot import it; put it into a file"
            )
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"benchmark: another process must be able to import {what}: a function at the top "
                f"of a module or script, or a functools.partial of one ({error})"
            ) from error
    return pickle.dumps(case)


def _child(connection: Any, case: bytes, errors: str) -> None:
    """What the process does: the run, and how it ended, to the other end of the connection."""
    with open(errors, "a") as file:
        os.dup2(file.fileno(), 2)
    try:
        found: Case = pickle.loads(case)  # written by this program, a moment ago
        connection.send(("result", run(found, lambda values: connection.send(("step", values)))))
    except GateError as error:
        connection.send(("result", {"failed": f"gate: {error}"}))
    except (Unsupported, ImportError, NotImplementedError) as error:
        connection.send(("result", {"unsupported": str(error)}))
    except (MemoryError, torch.OutOfMemoryError):
        connection.send(("result", {"failed": "out of memory"}))
    except Exception as error:
        traceback.print_exc()
        connection.send(("result", {"failed": f"{type(error).__name__}: {error}"}))


def in_a_process(case: Case, on_step: Callable[[Result], None]) -> Result:
    """The run in a process of its own; what happened to it, if it did not end well."""
    context = multiprocessing.get_context("spawn")
    content = packed(case)
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as errors:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, content, errors.name), daemon=True)
        before = os.environ.get(CHILD)
        os.environ[CHILD] = "1"
        try:
            process.start()
        finally:
            if before is None:
                del os.environ[CHILD]
            else:
                os.environ[CHILD] = before
        theirs.close()
        try:
            while True:
                kind, values = ours.recv()
                if kind == "result":
                    found: Result = values
                    return found
                on_step(values)
        except EOFError:
            process.join()
            return {"failed": _last_words(process.exitcode, errors)}
        finally:
            if process.is_alive() and sys.exc_info()[0] is not None:
                process.kill()
            process.join()
            ours.close()


def _last_words(status: int | None, errors: IO[str]) -> str:
    if status == -9:
        return "killed (out of memory?)"
    tail = " | ".join(errors.read().strip().splitlines()[-LINES:])
    return f"exit status {status}: {tail or 'it said nothing'}"


def rounds_of(
    cases: Mapping[str, Case], rounds: int, later_steps: int, on_event: Event
) -> list[Result]:
    """Every case in every round; the first has all steps and what comes after them, others few.

    A case that gave no figures is not tried again.
    """
    runs: list[Result] = []
    stopped: set[str] = set()
    for number in range(rounds):
        for name, case in cases.items():
            if name in stopped:
                continue
            if number:
                case = replace(case, steps=later_steps, after=None, flops=False)
            on_event("start", {"method": name, "round": number})
            result = in_a_process(case, lambda values: on_event("step", values))
            on_event("end", {"method": name, "round": number, "result": result})
            runs.append({"method": name, "round": number, **result})
            if "step_seconds" not in result:
                stopped.add(name)
    return runs
