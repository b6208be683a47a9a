# Copyright 2026 the mc-transformers authors.
"""Outputs that are whole or not there: written under a temporary name, renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, source: str | Path | None = None) -> Iterator[Path]:
    """A folder to write into, which takes the name `path` when the block has succeeded and vanishes when it fails.

    Args:
        source: what is read meanwhile, which must not be replaced.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, and not `overwrite`.
        ValueError: `path` is, or holds, the current folder or `source`.
    """
    path = Path(path)
    for kept, what in ((Path.cwd(), "the current folder"), (source, f"{source}, which is read")):
        if kept is not None and path.resolve() in (Path(kept).resolve(), *Path(kept).resolve().parents):
            raise ValueError(f"the output {str(path)!r} would replace {what}: name another folder")
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not (overwrite and path.is_dir()):
        raise FileExistsError(f"{path} exists already" + (" (--overwrite replaces it)" if path.is_dir() else ""))
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            old = path.with_name(path.name + ".replaced.partial")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it; several processes may write the same file."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
