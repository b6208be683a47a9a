# Copyright 2026 the mc-transformers authors.
"""Outputs that are whole or not there: written in a fresh hidden folder beside them, renamed at the end.

`PARENT/.mc-output-*` holds `new/NAME`, what is being written, and for a moment `old/NAME`, what it replaces. The old
one goes back to its name whenever the new one did not get there: at once, or, after a kill, at the next call.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


try:
    import fcntl
except ImportError:  # Windows: what a kill has left is not deleted there
    fcntl = None

logger = logging.get_logger(__name__)

PREFIX = ".mc-output-"
GRACE = 60  # seconds in which a temporary folder may not be locked yet


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, *sources: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` when the block has succeeded and vanishes when it fails.

    Args:
        sources: what is read meanwhile: files, folders, or names that are neither. None is replaced or written into.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, and not `overwrite`; or it is a symbolic link, or a
            mount point, which cannot be renamed.
        ValueError: `path` is, or holds, the current folder or a source, or a file that a link in a source leads to;
            or it lies in a source.
    """
    path = Path(path)
    _check_place(path, "folder", sources)
    _restore(path)
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not (overwrite and path.is_dir()):
        raise FileExistsError(f"{path} exists already" + (" (--overwrite replaces it)" if path.is_dir() else ""))
    with _beside(path) as temporary:
        new = temporary / "new" / path.name
        new.mkdir(parents=True)
        yield new
        _take_name(temporary, path, overwrite)


@contextmanager
def new_file(path: str | Path, overwrite: bool = False, *sources: str | Path) -> Iterator[Path]:
    """The same for one file: a path to write to.

    Raises:
        FileExistsError, ValueError: as of `new_folder`.
    """
    path = Path(path)
    _check_place(path, "file", sources)
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path} exists already" + (" (--overwrite replaces it)" if path.is_file() else ""))
    with _beside(path) as temporary:
        yield temporary / path.name
        os.replace(temporary / path.name, path)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it; several processes may write the same file."""
    path = Path(path)
    with _beside(path) as temporary:
        (temporary / path.name).write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary / path.name, path)


@contextmanager
def scratch() -> Iterator[Path]:
    """A fresh folder among the system's temporary ones, which vanishes; after a kill, at the next call."""
    with _beside(Path(tempfile.gettempdir()) / "scratch") as temporary:
        yield temporary


# ------------------------------------------------------------------------------------------------- what may be written
def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one place, whatever they are called."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


def _holds(folder: Path, place: Path) -> bool:
    """Whether `place` is `folder`, or lies in it."""
    place = Path(os.path.realpath(place))
    return any(_same(folder, each) for each in (place, *place.parents))


def _links(folder: Path) -> Iterator[Path]:
    """All symbolic links in a folder, at any depth."""
    for parent, folders, files in os.walk(folder):
        yield from (place for place in (Path(parent) / name for name in (*folders, *files)) if place.is_symlink())


def _check_place(path: Path, kind: str, sources: tuple[str | Path, ...]) -> None:
    """See `new_folder`."""
    if path.is_symlink():
        raise FileExistsError(f"{path} is a symbolic link to {os.readlink(path)}: name the {kind} that is meant")
    kept_places = [(Path.cwd(), "the current folder"), *((Path(each), f"{each}, which is read") for each in sources)]
    for kept, what in kept_places:
        if _holds(path, kept):
            raise ValueError(f"the output {str(path)!r} would replace {what}: name another {kind}")
    if path.name in ("", ".."):
        raise ValueError(f"the output {str(path)!r} has no name of its own: name a {kind}")
    if os.path.ismount(path):
        raise FileExistsError(f"{path} is a mount point, which cannot be replaced: name a {kind} in it")
    for source in map(Path, sources):
        if source.is_dir() and _holds(source, path):
            raise ValueError(f"the output {str(path)!r} lies in {source}, which is read: name a {kind} elsewhere")
        for link in _links(source) if path.exists() else ():
            if _holds(path, link):
                raise ValueError(f"the output {str(path)!r} would replace what {link} leads to: name another {kind}")


# ----------------------------------------------------------------------------------------------------- the two renames
@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, in use as long as it is locked; its `old/NAME` outlives it under its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path.parent))
    try:
        with _locked(temporary):
            yield temporary
    finally:
        _give_back(temporary, path)
        shutil.rmtree(temporary, ignore_errors=True)


def _take_name(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename `new/NAME` to `path`. What stands there is first renamed to `old/NAME`."""
    if overwrite and path.exists():
        old = temporary / "old" / path.name
        old.parent.mkdir()
        os.replace(path, old)
    elif path.exists():
        try:
            path.rmdir()
        except OSError as error:  # it has been filled meanwhile
            raise FileExistsError(f"{path} exists already: somebody else has written it meanwhile") from error
    os.replace(temporary / "new" / path.name, path)


def _give_back(temporary: Path, path: Path) -> bool:
    """Give an old output its name again if no new one has it."""
    old = temporary / "old" / path.name
    if path.exists() or not old.exists():
        return False
    os.replace(old, path)
    return True


def _restore(path: Path) -> None:
    """After a kill between the two renames."""
    for temporary in sorted(path.parent.glob(f"{PREFIX}*")):
        try:
            with _locked(temporary, wait=False):
                if _give_back(temporary, path):
                    logger.warning(f"{path}: an earlier call was killed while it replaced this output: it is back")
        except BlockingIOError:  # that call is still at it
            continue


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, which ends with the process. BlockingIOError: another one has it, and not `wait`."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _tidy(parent: Path) -> None:
    """Delete what killed calls have left in `parent`, unless an old output waits there for its name."""
    for left in parent.glob(f"{PREFIX}*") if fcntl else ():
        try:
            if time.time() - left.stat().st_mtime < GRACE:
                continue
            with _locked(left, wait=False):
                waits = [old for old in (left / "old").glob("*") if not (parent / old.name).exists()]
                if not waits:
                    shutil.rmtree(left, ignore_errors=True)
        except OSError:  # in use, or just gone
            continue
