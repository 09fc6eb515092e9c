"""Files replaced as one: what a dead save leaves, what a reader finds, who cleans up."""

import errno
import os
import threading
from pathlib import Path

import pytest

from minipeft.io import replace
from minipeft.io.replace import (
    COMMIT,
    NotOneSave,
    Replacement,
    current,
    finish,
    locked,
    read_whole,
    write_file,
)

FILES = {"a.safetensors": b"new a", "a.json": b"new config", "sub/b.json": b"new b"}


class Died(BaseException):
    """In the place of a kill."""


def old_state(folder):
    (folder / "sub").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"old")
    (folder / "stale.json").write_bytes(b"old")


def save(folder):
    with Replacement(folder) as new:
        for name, data in FILES.items():
            new.write(name, data)
        new.remove("stale.json")


def seen(folder):
    """The state as a reader finds it: what each file holds."""
    names = [*FILES, "stale.json"]
    places = {name: current(folder / name) for name in names}
    return {name: p.read_bytes() for name, p in places.items() if p.exists()}


def dies_at(monkeypatch, call):
    """Raise at the `call`-th change of the disk, and at each one after it: nothing is cleaned."""
    left = call

    def dying(own):
        def run(*args, **keywords):
            nonlocal left
            left -= 1
            if left <= 0:
                raise Died
            return own(*args, **keywords)

        return run

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def test_whenever_a_save_dies_all_files_are_old_or_all_are_new(tmp_path):
    outcomes = []
    for call in range(1, 200):
        folder = tmp_path / str(call)
        old_state(folder)
        old = seen(folder)
        with pytest.MonkeyPatch.context() as patch:
            dies_at(patch, call)
            try:
                save(folder)
            except Died:
                died = True
            else:
                died = False
        state = seen(folder)
        assert state in (old, FILES), call
        outcomes.append(state == FILES)
        save(folder)
        assert seen(folder) == FILES
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
            "a.json", "a.safetensors", "b.json",
        ]  # fmt: skip
        assert not list(folder.rglob(".*"))
        if not died:
            break
    assert not died and outcomes == sorted(outcomes)  # once new it is never old again
    assert 5 < outcomes.index(True) < len(outcomes) - 5  # moments on both sides of the rename


def test_a_full_disk_leaves_the_old_files_and_nothing_beside_them(tmp_path, monkeypatch):
    old_state(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    sync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*while writing.*a\.json"):
        save(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_save_that_fails_in_a_new_folder_leaves_no_folder(tmp_path):
    with (
        pytest.raises(ValueError, match="no name of a file"),
        Replacement(tmp_path / "new" / "deep") as unit,
    ):
        [unit.write(name, b"") for name in ("a.safetensors", "b.exe")]
    assert list(tmp_path.iterdir()) == []


def test_a_commit_of_the_folder_above_is_read_in_a_folder_of_it(tmp_path):
    old_state(tmp_path)
    new = tmp_path / COMMIT / "new" / "sub"
    new.mkdir(parents=True)
    (new / "b.json").write_bytes(b"committed")
    assert current(tmp_path / "sub" / "b.json").read_bytes() == b"committed"
    with Replacement(tmp_path / "sub") as unit:  # finishes that first, so it is the later one
        assert (tmp_path / "sub" / "b.json").read_bytes() == b"committed"
        unit.write("b.json", b"later")
    assert (tmp_path / "sub" / "b.json").read_bytes() == b"later"
    assert not (tmp_path / COMMIT).exists()


def test_a_name_that_is_gone_in_a_commit_is_not_there(tmp_path):
    old_state(tmp_path)
    (tmp_path / COMMIT / "gone").mkdir(parents=True)
    (tmp_path / COMMIT / "gone" / "stale.json").touch()
    assert not current(tmp_path / "stale.json").exists()
    finish(tmp_path)
    assert not (tmp_path / "stale.json").exists() and not (tmp_path / COMMIT).exists()


@pytest.mark.parametrize("kind", ["script", "hidden", "deep", "link", "linked folder"])
def test_a_commit_folder_that_no_save_wrote_is_not_moved(tmp_path, kind):
    new, outside = tmp_path / "here" / COMMIT / "new", tmp_path / "outside"
    new.mkdir(parents=True)
    outside.mkdir()
    if kind == "link":
        (new / "a.json").symlink_to(outside)
    elif kind == "linked folder":
        (tmp_path / "here" / "sub").symlink_to(outside)
        (new / "sub").mkdir()
        (new / "sub" / "a.json").write_bytes(b"x")
    else:
        path = new / {"script": "run.sh", "hidden": ".a.json", "deep": "a/b/c.json"}[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no save puts this there|a link"):
        save(tmp_path / "here")
    assert list(outside.iterdir()) == []
    assert not [p for p in (tmp_path / "here").iterdir() if p.name not in (COMMIT, "sub")]


@pytest.mark.parametrize("name", ["../a.json", "a/b/c.json", ".a.json", "a.bin", "/a.json", ""])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with (
        pytest.raises(ValueError, match="no name of a file to replace"),
        Replacement(tmp_path) as unit,
    ):
        unit.write(name, b"")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_found_before_the_moment(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ValueError, match="a folder is where this file goes"):
        save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_next_save_removes_what_dead_ones_left_and_nothing_of_those_that_live(tmp_path):
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    for name in (f".a.json.{gone}.tmp", f".a.json.{os.getpid()}.tmp", ".mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".minipeft-1-0123").mkdir()
    alive = Replacement(tmp_path)
    alive.__enter__()
    alive.write("c.json", b"c")
    save(tmp_path)
    alive.__exit__(None, None, None)
    assert (tmp_path / "c.json").read_bytes() == b"c"
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))
    assert left == sorted([f".a.json.{os.getpid()}.tmp", ".mine.tmp"])


def test_threads_that_save_into_one_folder_take_turns(tmp_path):
    errors = []

    def work(text):
        try:
            for _ in range(15):
                with Replacement(tmp_path) as unit:
                    for name in ("a.json", "b.json"):
                        unit.write(name, text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in (b"1", b"2", b"3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_a_lock_is_one_for_all_who_open_the_folder(tmp_path):
    with locked(tmp_path) as first, locked(tmp_path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path, wait=False) as third:
        assert third is True


def test_a_read_that_fails_is_done_again_only_where_files_were_replaced(tmp_path, monkeypatch):
    calls = []

    def damaged():
        calls.append("damaged")
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        read_whole(tmp_path, damaged)
    assert calls == ["damaged"]

    def beside_a_writer():
        calls.append("")
        if len(calls) < 5:
            write_file(tmp_path / "a.json", b"x" * len(calls))
            raise FileNotFoundError
        return "whole"

    assert read_whole(tmp_path, beside_a_writer) == "whole" and len(calls) == 5

    def mixed():
        calls.append("mixed")
        raise NotOneSave

    monkeypatch.setattr(replace, "_PATIENCE", 0.3)
    with pytest.raises(NotOneSave):
        read_whole(tmp_path, mixed)
    assert calls.count("mixed") == 3

    def always():
        write_file(tmp_path / "a.json", os.urandom(9))
        raise NotOneSave

    with pytest.raises(NotOneSave):
        read_whole(tmp_path, always)


def test_paths_without_a_folder_are_those_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Replacement(Path()) as unit:
        unit.write("a.json", b"1")
        unit.write("b.json", b"2")
    assert current(Path("a.json")).read_bytes() == b"1"
    write_file(Path("c"), b"3")
    assert sorted(os.listdir()) == ["a.json", "b.json", "c"]


def test_where_the_system_has_no_locks_saves_work_and_clean_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fcntl", None)
    old_state(tmp_path)
    (tmp_path / ".minipeft-1-0123").mkdir()
    save(tmp_path)
    assert seen(tmp_path) == FILES and (tmp_path / ".minipeft-1-0123").is_dir()


@pytest.mark.parametrize("part", ["", "new", "gone"])
def test_a_commit_that_leads_elsewhere_is_refused_and_nothing_there_changes(tmp_path, part):
    victim, folder = tmp_path / "victim", tmp_path / "saved"
    victim.mkdir()
    (victim / "precious.json").write_text("{}")
    commit = folder / COMMIT
    (commit if part else folder).mkdir(parents=True)
    (commit / part if part else commit).symlink_to(victim)
    with pytest.raises(ValueError, match="a link"), Replacement(folder) as unit:
        unit.write("a.json", b"{}")
    with pytest.raises(ValueError, match="a link"):
        current(folder / "a.json")
    assert (victim / "precious.json").exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_where_a_folder_goes_is_found_before_the_moment(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "saved"
    folder.mkdir()
    if kind == "link":
        (folder / "b").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "b").write_text("mine")
    with pytest.raises(ValueError, match="move it"), Replacement(folder) as unit:
        unit.write("b/a.json", b"{}")
    assert [path.name for path in folder.iterdir()] == ["b"]
    with Replacement(folder) as unit:
        unit.write("a.json", b"{}")
    assert (folder / "a.json").exists()


def test_temporary_files_of_strangers_stay(tmp_path):
    (tmp_path / ".notes.99999999.tmp").write_text("mine")
    with Replacement(tmp_path) as unit:
        unit.write("a.json", b"{}")
    assert (tmp_path / ".notes.99999999.tmp").exists()


def test_a_dangling_link_makes_no_reader_wait(tmp_path):
    (tmp_path / ".#lock").symlink_to("nowhere")
    (tmp_path / "dead.json").symlink_to("nowhere")
    calls = []

    def read():
        calls.append(1)
        raise ValueError("wrong model")

    with pytest.raises(ValueError, match="wrong model"):
        read_whole(tmp_path, read)
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that fork")
def test_a_process_that_was_forked_during_a_save_keeps_no_lock(tmp_path):
    read_end, write_end = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(read_end, 1)
            os._exit(0)
    with locked(tmp_path, wait=False) as alone:
        assert alone
    os.write(write_end, b"x")
    os.waitpid(child, 0)
