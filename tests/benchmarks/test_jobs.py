"""The front door: every job is there, has an option for each word of its small run, and is told."""

import json
import re
import sys

import pytest

pytest.importorskip("rich")

from benchmarks import __main__ as door
from benchmarks import jobs

FOLDER = jobs.RESULTS.parent


@pytest.mark.parametrize("name", jobs.JOBS)
def test_a_job_has_a_main_and_the_options_of_its_small_run(name):
    job = jobs.JOBS[name]
    text = (FOLDER / f"{job.module}.py").read_text()
    assert "\ndef main(" in text
    assert '\nif __name__ == "__main__":' in text
    assert job.group in jobs.GROUPS
    for word in job.quick or ():
        if word.startswith("--"):
            plain = word.replace("--no-", "--")
            generated = job.module == "compare"  # sizes of a LLaMA come from its fields
            assert f'"{plain}"' in text or generated, f"{name} has no {word}"


def test_the_table_names_every_job(capsys):
    door.show_jobs()
    said = capsys.readouterr().out
    for name, job in jobs.JOBS.items():
        assert re.search(rf"│ {name} +│", said), name
        assert job.question.split()[0] in said


def test_the_newest_result_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    assert jobs.last_result("cpu") == "-"
    for day in (1, 2):
        path = tmp_path / f"cpu-2026010{day}-000000.json"
        path.write_text(json.dumps({"when": f"2026-01-0{day}T00:00:00+00:00"}))
    assert jobs.last_result("cpu") == "cpu-20260102-000000.json (2026-01-02)"


def test_an_unknown_job_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "methodz"])
    assert door.main() == 2
    assert "no job 'methodz'" in capsys.readouterr().err


@pytest.mark.slow
def test_small_runs_of_three_jobs(tmp_path, capsys, monkeypatch):
    words = ["--quick", "--only", "trips", "nf4_sweep", "recipes", "--output", str(tmp_path)]
    assert door.run_all(words) == 0
    said = capsys.readouterr().out
    assert "recipes: not in a quick run" in said and "2 jobs in" in said
    (path,) = tmp_path.glob("all-quick-*.json")
    assert [run["name"] for run in json.loads(path.read_text())["runs"]] == ["trips", "nf4_sweep"]


@pytest.mark.slow
def test_a_model_of_ones_own_by_its_file(tmp_path):
    from tests.benchmarks.test_methods import run

    own = FOLDER.parent / "tests" / "measure" / "own_gpt.py"
    words = ["--head", "head", "--steps", "2", "--rounds", "1", "--methods", "full", "qlora"]
    done = run("methods", "--model", f"{own}:make_model", *words, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "QLoRA" in done.stdout and "GFLOPs" in done.stdout
    wrong = run("methods", "--model", f"{own}:nothing", "--output", str(tmp_path))
    assert wrong.returncode == 2 and "has no function 'nothing'" in wrong.stderr
