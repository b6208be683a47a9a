"""An output never costs a user a folder: neighbours, sources and links stay, and whatever stops a call, at any line of
it, leaves the old or the new output under its name.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_transformers.hub import files


def tree(folder: Path) -> dict[str, str]:
    """Names and contents of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> Path:
    (folder / "in").mkdir(parents=True)
    (folder / "a").write_text(text)
    (folder / "in" / "b").write_text(text)
    return folder


OLD, NEW = ({"a": text, "in/b": text} for text in ("old", "new"))


def write(path: Path, overwrite: bool = True) -> None:
    with files.new_folder(path, overwrite) as folder:
        fill(folder / "all", "new")
        for entry in (folder / "all").iterdir():
            entry.rename(folder / entry.name)
        (folder / "all").rmdir()


# ------------------------------------------------------------------------------------------ neighbours, sources, links
def test_neighbours_of_any_name_stay(tmp_path):
    names = [f"out{end}" for end in (".partial", ".replaced.partial", ".tmp", ".old", ".new", "~", ".1.partial")]
    names += [f"{files.PREFIX}mine", f".out.{os.getpid()}.partial"]
    for name in names:
        fill(tmp_path / name, "old")
    for _ in range(2):
        write(tmp_path / "out")
        files.write_file(tmp_path / "out.txt", "new")
    assert all(tree(tmp_path / name) == OLD for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "out", "out.txt"}


def test_sources_are_known_by_identity(tmp_path, monkeypatch):
    source = fill(tmp_path / "source", "old")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "blob").write_text("old")
    (source / "in" / "weights").symlink_to(tmp_path / "blobs" / "blob")
    monkeypatch.chdir(tmp_path)
    kept = tree(tmp_path)
    refused = [
        ("source", "source", "would replace"),
        ("link/../source", "source", "would replace"),
        (source.parent, "source", "would replace"),
        ("source", "link", "would replace"),
        ("source/out", "source", "lies in"),
        ("link/in/out", "source", "lies in"),
        ("source/out", "link", "lies in"),
        ("blobs", "source", "leads to"),
        ("blobs/..", "source", "would replace"),
        (".", "elsewhere", "current folder"),
    ]
    for output, read, words in refused:
        for make in (files.new_folder, files.new_file):
            with pytest.raises(ValueError, match=words), make(output, True, read):
                raise AssertionError("the work has begun")
    with pytest.raises(ValueError, match="would replace"), files.new_folder("blobs", True, "elsewhere", "blobs/blob"):
        pass
    assert tree(tmp_path) == kept
    with files.new_file(tmp_path / "blobs" / "other", False, source / "a") as file:  # beside a file that is read
        file.write_text("new")


@pytest.mark.parametrize("to", ["full", "empty", "nowhere"])
def test_a_link_as_output_is_refused_before_the_work(tmp_path, to):
    fill(tmp_path / "full", "old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(to)
    for make in (files.new_folder, files.new_file):
        with pytest.raises(FileExistsError, match="symbolic link"), make(tmp_path / "link", True):
            raise AssertionError("the work has begun")
    with pytest.raises(FileExistsError, match="mount point"), files.new_folder("/proc"):
        pass
    assert os.readlink(tmp_path / "link") == to and tree(tmp_path / "full") == OLD


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError, match="meanwhile"), files.new_folder(tmp_path / "out") as folder:
        fill(folder, "new").joinpath("more").write_text("new")
        fill(tmp_path / "out", "old")
    assert tree(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}


def test_permissions_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "file").touch()
    write(tmp_path / "out")
    files.write_file(tmp_path / "written", b"")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "file").stat().st_mode


# ------------------------------------------------------------------------------------------------------- interruptions
def stop_at_line(number: int, stop: Callable[[], None], work: Callable[[], None]) -> bool:
    """Call `stop` before the `number`th line of hub/files.py that runs. Returns whether there were as many."""
    left = number

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != files.__file__:
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            stop()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], bool]) -> bool:
    """Whether a forked copy of this process was killed by what it did."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def settled(path: Path) -> dict[str, str]:
    """The output as the next call finds it, whatever was left in between."""
    with pytest.raises(ZeroDivisionError), files.new_folder(path, True):
        raise ZeroDivisionError
    return tree(path)


@pytest.mark.parametrize(
    ("how", "before"),
    [("interrupted", "old"), ("interrupted", "empty"), ("interrupted", "nothing"), ("killed", "old")],
)
def test_stopped_at_every_line(tmp_path, monkeypatch, how, before):
    """Interrupted, the output is whole at once; killed, at the next call at the latest, and always when it was new."""
    monkeypatch.setattr(files, "GRACE", -1)
    number, results = 0, set()
    while True:
        number += 1
        place = tmp_path / str(number)
        fill(place / "out.partial", "old")
        if before == "old":
            fill(place / "out", "old")
        elif before == "empty":
            (place / "out").mkdir()

        def work(place=place):
            write(place / "out", overwrite=before == "old")

        if how == "interrupted":
            stopped = stop_at_line(number, interrupt, work)
            found = tree(place / "out")
        else:
            stopped = in_child(lambda number=number, work=work: stop_at_line(number, kill, work))
            found = settled(place / "out")
        assert found in ([OLD, NEW] if before == "old" else [{}, NEW]), (number, found)
        assert settled(place / "out") == found
        files.write_file(place / "last", "")
        assert {path.name for path in place.iterdir()} <= {"out", "out.partial", "last"}, number
        assert tree(place / "out.partial") == OLD
        results.add(str(found))
        if not stopped:
            break
    assert number > 40 and len(results) == 2


@given(data=st.data())
def test_stopped_again_while_tidying_up(tmp_path_factory, data):
    """Ctrl-C twice, or errors of the disk: some calls of the system fail, before or after they took effect."""
    place = tmp_path_factory.mktemp("outputs")
    old = data.draw(st.booleans(), "an output is there")
    failing = data.draw(st.sets(st.integers(1, 14), min_size=1, max_size=4), "numbers of calls that fail")
    error = data.draw(st.sampled_from([KeyboardInterrupt, OSError(28, "No space left on device")]))
    late = data.draw(st.booleans(), "after their effect")
    if old:
        fill(place / "out", "old")
    count = 0

    def planted(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if late:
                result = function(*args, **options)
            if count in failing:
                raise error
            return result if late else function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "GRACE", -1)
        for module, name in ((os, "replace"), (files.shutil, "rmtree"), (files.tempfile, "mkdtemp"), (os, "mkdir")):
            patch.setattr(module, name, planted(getattr(module, name)))
        try:
            write(place / "out")
            done = True
        except (KeyboardInterrupt, OSError):
            done = False
    found = settled(place / "out")
    assert found == NEW if done else found in ([OLD, NEW] if old else [{}, NEW])
