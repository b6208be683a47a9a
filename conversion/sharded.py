# Copyright 2026 the mc-transformers authors.
"""Folders of `torch.distributed.checkpoint`, read without a process group and without running what a file may hold."""

import pickle
from collections.abc import Iterator
from pathlib import Path, PurePath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo


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
ALLOWED |= {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}


class _Index(pickle.Unpickler):
    """Knows the classes of an index and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
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
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / INDEX} is not an index of a sharded checkpoint, or damaged ({error})"
            ) from error
        for file in {place.relative_path for place in places}:
            if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
                raise ValueError(f"{folder / INDEX} names a file outside of its folder: {file!r}")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder}: the index names {file}, which is not there")
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
