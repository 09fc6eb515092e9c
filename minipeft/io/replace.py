"""Several files of a folder replaced as one: whenever a save dies, all are old or all are new.

    folder/.minipeft-<random>/new/<file>   what a save writes, whole and flushed; nobody reads it
    folder/.minipeft-commit/new/<file>     the same after one rename: now the new state holds
    folder/.minipeft-commit/gone/<file>    a name that the new state does not have
    folder/<file>                          where the files go next; then the commit folder goes

A save that dies before the rename leaves the old state.  After it, `current` says where the new
files are, and the next save moves them to their places.  Programs that know nothing of the commit
folder (PEFT) see the files change one after the other while they are moved: a moment, or, if the
save dies in it, until the next save.  Two saves into one folder take turns by a lock that the
system drops when its holder dies; where there is none (Windows, some network disks) that is for
the caller to arrange, and what dead saves left is not cleaned.
"""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

COMMIT = ".minipeft-commit"
_STAGE, _NEW, _GONE = ".minipeft-", "new", "gone"
_FILE = re.compile(r"([\w-]+/)?[\w-][\w.-]*\.(safetensors|json)")
_TEMPORARY = re.compile(r"\.[\w.-]+\.(safetensors|json)\.(?P<pid>\d{1,10})(-[0-9a-f]{16})?\.tmp")
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_PATIENCE = 10.0  # seconds for which a reader gives way to writers
Result = TypeVar("Result")


class NotOneSave(ValueError):
    """Two files that belong together are of different saves, or one was edited."""


class Replacement:
    """Files of one folder, and of folders in it, that take the places of older ones together.

    Use as a context: `write` and `path` put files into a folder that nobody reads; when the
    context ends they become the folder's state in one rename.  An error inside the context, a full
    disk for example, leaves the folder as it was.  Names are `file` or `folder/file`, and files
    end in .safetensors or .json.

    Raises:
        ValueError: a name of another form, or a place where a folder is.
        OSError: the disk is full, and the like; the message names the file.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Replacement(folder) as new:
    ...     new.write("a.json", b"{}")
    ...     new.remove("b.json")
    >>> sorted(path.name for path in folder.iterdir())
    ['a.json']
    """

    def __init__(self, folder: Path, *, check: Callable[[], None] | None = None) -> None:
        self.folder = folder.absolute()
        self._check = check  # called while the lock is held; raises if the folder is not to be used

    def __enter__(self) -> "Replacement":
        self._made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stage = self.folder / f"{_STAGE}{os.getpid()}-{secrets.token_hex(8)}"
        self._held = ExitStack()
        try:
            finish(self.folder)
            with locked(self.folder):
                _clean(self.folder)
                if self._check is not None:
                    self._check()
                self._stage.mkdir()
                self._held.enter_context(locked(self._stage))  # while it is held we are alive
            for name in (_NEW, _GONE):
                (self._stage / name).mkdir()
        except BaseException:
            self._drop()
            raise
        return self

    def path(self, name: str) -> Path:
        """Where to write this file, in the folder that nobody reads yet."""
        if not _FILE.fullmatch(name):
            raise ValueError(f"{self.folder}: {name!r:.80} is no name of a file to replace")
        return self._in(_NEW, name)

    def write(self, name: str, data: bytes) -> None:
        """Write one file, and flush it to the disk."""
        _write(self.path(name), data, self.folder / name)

    def remove(self, name: str) -> None:
        """The new state has no file of this name."""
        self._in(_GONE, name).touch()

    def _in(self, kind: str, name: str) -> Path:
        place = self.folder / name
        if place.is_dir():
            raise ValueError(f"{place}: a folder is where this file goes; move it")
        above = place.parent
        if above != self.folder and (above.is_symlink() or (above.exists() and not above.is_dir())):
            raise ValueError(f"{above}: a link or a file, where a save wants a folder; move it")
        path = self._stage / kind / name
        path.parent.mkdir(exist_ok=True)
        return path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._drop()

    def _commit(self) -> None:
        for folder in (self._stage, *(p for p in self._stage.rglob("*") if p.is_dir())):
            _sync(folder)
        finish(self.folder)
        with locked(self.folder):
            _finish(self.folder)
            if self._check is not None:
                self._check()
            os.rename(self._stage, self.folder / COMMIT)  # from here on the new state holds
            self._made = []
            _sync(self.folder)
            _finish(self.folder)

    def _drop(self) -> None:
        """Remove what was written and not committed, and folders made for it."""
        if self._stage.exists():
            shutil.rmtree(self._stage)
        self._held.close()
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # somebody else's files are in it, or ours
                return


def write_file(path: Path, data: bytes) -> None:
    """Replace one file of any name: write under a temporary name, flush to the disk, rename.

    Raises:
        OSError: the disk is full, and the like; the message names the file, which is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        _write(temporary, data, path)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    _clean_temporaries(path.parent)


def _write(place: Path, data: bytes, name: Path) -> None:
    """Write a file and flush it; an error names the file as which it was meant."""
    try:
        with open(place, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        what = f"{error.strerror or error} while writing"
        raise OSError(error.errno, what, str(name)) from error


def current(path: Path) -> Path:
    """Where this file is to be read: in a commit that is not finished, or in its place.

    The path that is returned need not exist: a file may be of the old state only.
    """
    path = path.absolute()
    for folder in (path.parent.parent, path.parent):  # a commit above was made later, see finish
        commit, inside = folder / COMMIT, path.relative_to(folder)
        _refuse_links(commit)
        if (commit / _NEW / inside).exists() or (commit / _GONE / inside).exists():
            return commit / _NEW / inside
    return path


def _refuse_links(commit: Path) -> None:
    """Raise ValueError if a commit folder or a part of it leads elsewhere: no save makes links."""
    for path in (commit, commit / _NEW, commit / _GONE):
        if path.is_symlink():
            raise ValueError(f"{path}: a link, which no save makes; delete it")


def read_whole(folder: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns; called again if it failed because files were replaced meanwhile.

    `read` changes nothing when it fails.  Gives up after ten seconds with its last error.
    """
    deadline, mixed = time.monotonic() + _PATIENCE, 0
    while True:
        before = _seen(folder)
        try:
            return read()
        except (ValueError, OSError) as error:
            mixed += isinstance(error, NotOneSave)
            # the system may give a new file its predecessor's number and time: look twice
            again = 0 < mixed < 3 or _seen(folder) != before
            if not again or time.monotonic() > deadline:
                raise
        time.sleep(0.002)


def _seen(folder: Path) -> list[object]:
    """What tells one state of a folder from another: names, numbers, sizes and times."""
    folder, found = folder.absolute(), list[object]()
    for place in (folder, folder / COMMIT / _NEW, folder.parent / COMMIT / _NEW / folder.name):
        try:
            with os.scandir(place) as entries:
                stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries
                         if entry.name.endswith((".safetensors", ".json", COMMIT))]  # fmt: skip
        except FileNotFoundError:
            found.append(time.monotonic_ns() if place.exists() else None)  # moved while we looked
        except OSError:
            found.append(None)
        else:
            found.append(sorted((n, s.st_ino, s.st_size, s.st_mtime_ns) for n, s in stats))
    return found


def finish(folder: Path) -> None:
    """Move the files that a dead save has committed to their places, here or in the folder above.

    The one above goes first, and every save into this folder sees to that: so where both have a
    commit the one above is the later.
    """
    folder = folder.absolute()
    above = folder.parent
    inside = [above / COMMIT / kind / folder.name for kind in (_NEW, _GONE)]
    for place, there in ((above, inside), (folder, [folder / COMMIT])):
        if any(path.is_dir() for path in there):
            with locked(place):
                _finish(place)


def _finish(folder: Path) -> None:
    """Move one folder's committed files to their places; the caller holds the folder's lock."""
    commit = folder / COMMIT
    _refuse_links(commit)
    if not commit.exists():
        return
    new, gone = (_files_in(commit / kind) for kind in (_NEW, _GONE))
    inside = sorted({Path(name).parent for name in (*new, *gone)} - {Path()})
    with ExitStack() as locks:
        for name in inside:
            if (folder / name).is_symlink():
                raise ValueError(f"{folder / name}: a link, where a save wants a folder")
            (folder / name).mkdir(exist_ok=True)
            locks.enter_context(locked(folder / name))
            _finish(folder / name)
        for file in new:
            os.replace(commit / _NEW / file, folder / file)
        for file in gone:
            (folder / file).unlink(missing_ok=True)
            (commit / _GONE / file).unlink()
        for name in (Path(), *inside):
            _sync(folder / name)
        shutil.rmtree(commit)


def _files_in(folder: Path) -> list[str]:
    """Names in a part of a commit folder: weights first, for readers that know nothing of it.

    Raises:
        ValueError: something that no save puts there.
    """
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (not path.is_dir() and not _FILE.fullmatch(name)):
            raise ValueError(f"{path}: no save puts this there; delete {folder.parent}")
        if not path.is_dir():
            found[name] = (name.endswith(".json"), name.endswith("config.json"), name)
    return sorted(found, key=lambda name: found[name])


def _clean(folder: Path) -> None:
    """Remove what dead saves left before they committed; the caller has the folder's lock."""
    _clean_temporaries(folder)
    for path in folder.glob(f"{_STAGE}*"):
        if path.name == COMMIT or path.is_symlink():
            continue
        try:
            with locked(path, wait=False) as alone:
                if alone:
                    shutil.rmtree(path)
        except OSError:  # its owner, who lives, was faster; or it is another user's
            continue


def _clean_temporaries(folder: Path) -> None:
    """Remove temporary files of processes of this machine that are gone."""
    for path in folder.glob(".*.tmp"):
        name = _TEMPORARY.fullmatch(path.name)
        if name and not _is_alive(int(name["pid"])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine; True where that cannot be asked."""
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold a folder's lock; gives True, or False (without `wait`): another one holds it.

    Gives None where the system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    number = os.open(folder, os.O_RDONLY)
    held: bool | None = True
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            held = None
        yield held
    finally:
        if held:  # a process that was forked meanwhile has the lock too, and would keep it
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system lets one."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(number)
