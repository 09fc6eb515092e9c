"""Several processes of one job on this machine, over gloo: all end, or all are ended."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_together(module: str, n: int, folder: Path, *arguments: str, limit: float = 600) -> str:
    """`python -m module arguments` in n processes that meet in a file; what the first printed.

    Each gets RANK, WORLD_SIZE, and MEET, a path for `init_method=f"file://{MEET}"`.  When one
    fails or `limit` seconds are over, the rest are ended too, and what it wrote is the error.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(n)}
    started, outputs = [], []
    for rank in range(n):
        outputs.append(folder / f"{rank}.txt")
        with outputs[-1].open("w") as out:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                    env={**shared, "RANK": str(rank), "MEET": str(folder / "meet")},
                )
            )  # fmt: skip
    end = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in started):
            failed = [r for r, process in enumerate(started) if process.poll() not in (None, 0)]
            assert not failed, f"process {failed[0]}: {outputs[failed[0]].read_text()[-4000:]}"
            assert time.monotonic() < end, (
                f"not done in {limit} s: {outputs[0].read_text()[-4000:]}"
            )
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    for rank, process in enumerate(started):
        assert process.returncode == 0, outputs[rank].read_text()[-4000:]
    return outputs[0].read_text()
