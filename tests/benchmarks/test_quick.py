"""All jobs, small: a failure or a limit ends one job and not the others, and nothing is kept."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import jobs, quick

PRINTS = "print('three figures'); print('written: x.json in y/')"
CODES = {
    "good": PRINTS,
    "bad": "import sys; print('no such thing'); sys.exit(3)",
    "slow": "import time; time.sleep(60)",
    "after": PRINTS,
}


@pytest.fixture
def four_jobs(monkeypatch):
    """Four jobs that are one line of Python each, and one that is not run."""
    made = {name: jobs.Job(name, "speed", "?", 1, ("FOLDER/x",)) for name in CODES}
    made["never"] = jobs.Job("never", "speed", "?", 1, None, "a folder")
    monkeypatch.setattr(quick, "JOBS", made)
    plain, commands = quick.finished, []

    def finished(command, timeout):
        commands.append(command)
        return plain([sys.executable, "-c", CODES[command[3]]], timeout)

    monkeypatch.setattr(quick, "finished", finished)
    return commands


def test_a_failed_job_and_a_slow_one_do_not_end_the_others(four_jobs, tmp_path, capsys):
    words = ["--quick", "--timeout", "10", "--output", str(tmp_path)]
    assert quick.run_all(words) == 1
    said = capsys.readouterr().out
    assert "no such thing" in said and "failed: bad, slow" in said and "never" in said
    (path,) = tmp_path.glob("all-quick-*.json")
    found = json.loads(path.read_text())
    assert found["failed"] == ["bad", "slow"]
    assert {"when", "hardware", "versions", "commit"} <= set(found)
    runs = {run["job"]: run for run in found["runs"]}
    assert list(runs) == [*CODES, "never"]
    assert runs["good"]["result"] == runs["after"]["result"] == "three figures"
    assert runs["bad"]["exit"] == 3 and runs["bad"]["output"] == "no such thing\n"
    assert runs["slow"]["exit"] == -signal.SIGKILL
    assert runs["slow"]["result"] == "failed: took more than 10 s"
    assert runs["slow"]["seconds"] >= 10
    assert runs["never"]["exit"] is None and runs["never"]["result"] == "not run: needs a folder"


def test_jobs_write_into_folders_that_are_gone_afterwards(four_jobs, tmp_path):
    assert quick.run_all(["--quick", "--only", "good", "after", "--output", str(tmp_path)]) == 0
    folders = [command[command.index("--output") + 1] for command in four_jobs]
    assert len(set(folders)) == 2
    for command, folder in zip(four_jobs, folders, strict=True):
        assert f"{folder}/x" in command
        assert not Path(folder).exists() and Path(folder) != jobs.RESULTS


def test_a_job_that_takes_too_long_is_killed_with_its_children(tmp_path):
    file = tmp_path / "pid"
    code = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(file)!r}, 'w').write(str(child.pid)); child.wait()"
    )
    status, _ = quick.finished([sys.executable, "-c", code], 10)
    assert status is None
    for _ in range(100):  # the killed child is a zombie until the system's first process takes it
        if not is_running(int(file.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def is_running(pid):
    """Whether a process is there and no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


@pytest.mark.slow
def test_small_runs_leave_the_real_results_alone(tmp_path, capsys):
    before = sorted(path.name for path in jobs.RESULTS.iterdir())
    words = ["--quick", "--only", "trips", "nf4_sweep", "tuple_caches", "--output", str(tmp_path)]
    assert quick.run_all(words) == 0
    said = capsys.readouterr().out
    assert "tuple_caches: 0 s, not run" in said and "2 jobs in" in said
    assert sorted(path.name for path in jobs.RESULTS.iterdir()) == before
