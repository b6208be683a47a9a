# Copyright 2026 the mc-transformers authors.
"""Folders of `torch.distributed.checkpoint`, read without a process group and without running what a file may hold."""

import pickle
from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PurePath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from ..hub.inputs import check_inside


INDEX = ".metadata"
# all that an index is made of; anything else in the pickle is refused
ALLOWED = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        parts.Metadata,
        parts.TensorStorageMetadata,
        parts.ChunkStorageMetadata,
        parts.TensorProperties,
        parts.BytesStorageMetadata,
        parts.MetadataIndex,
        parts.StorageMeta,
        parts._MEM_FORMAT_ENCODING,
        _StorageInfo,
    )
}
OTHERS = {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}


# whose objects have a state to be set; that of anything else (a class, a function, a dtype) would outlive the file
STATEFUL = tuple(kind for kind in ALLOWED.values() if isinstance(kind, type) and not issubclass(kind, Enum))


class _Index(pickle._Unpickler):
    """Knows the classes of an index and nothing that could run code. The unpickler in Python, whose steps can be
    overridden: the one in C sets attributes of classes too."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], STATEFUL):
            raise pickle.UnpicklingError(f"the state of {self.stack[-2]!r} does not belong into an index")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> object:
        if found := ALLOWED.get((module, name)) or OTHERS.get((module, name)):
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "pathlib":
            return PurePath
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")


class _Reader(FileSystemReader):
    """Reads the index once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            with open(folder / INDEX, "rb") as file:
                self.index = _Index(file).load()
            places = self.index.storage_data.values()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError) as error:
            raise ValueError(
                f"{folder / INDEX} is not an index of a sharded checkpoint, or damaged ({error})"
            ) from error
        check_inside(folder, {str(place.relative_path) for place in places}, INDEX)
        if self.index.storage_meta is None:
            self.index.storage_meta = parts.StorageMeta()

    def read_metadata(self, *args, **kwargs) -> parts.Metadata:
        return self.index


def read_sharded(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, one after the other; what is not a tensor is left out.

    Raises:
        ValueError: the index or a file is damaged, or is something else. FileNotFoundError: a file is missing.
    """
    reader = _Reader(Path(folder))
    for name, about in reader.index.state_dict_metadata.items():
        if not isinstance(about, parts.TensorStorageMetadata):
            continue
        tensor = torch.empty(about.size, dtype=about.properties.dtype)
        try:
            dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException, a whole traceback
            reason = str(error).strip().splitlines()[-1][:200]
            raise ValueError(f"{folder} is damaged or cut off at {name!r} ({reason})") from error
        yield name, tensor
