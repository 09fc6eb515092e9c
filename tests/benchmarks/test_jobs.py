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
    assert '"--output"' in text or "add_output(" in text
    assert (job.quick is None) == bool(job.needs)
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


def test_the_readme_has_the_table_of_jobs():
    """Made by `python -m benchmarks markdown`."""
    assert jobs.markdown() in (FOLDER / "README.md").read_text()
    assert jobs.markdown().count("\n") == len(jobs.JOBS) + 2


def test_a_workflow_runs_all_jobs_every_week():
    yaml = pytest.importorskip("yaml")
    path = FOLDER.parent / ".github" / "workflows" / "benchmarks.yml"
    plan = yaml.load(path.read_text(), yaml.BaseLoader)  # plain text: `on` is not a truth value
    assert set(plan["on"]) == {"schedule", "workflow_dispatch"}
    minute, hour, *days = plan["on"]["schedule"][0]["cron"].split()
    assert minute.isdigit() and hour.isdigit() and days == ["*", "*", "1"]
    steps = plan["jobs"]["quick"]["steps"]
    assert any("benchmarks all --quick --output build" in step.get("run", "") for step in steps)
    (kept,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert kept["with"]["path"] == "build/all-quick-*.json" and kept["if"] == "always()"


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
