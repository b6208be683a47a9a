# Copyright 2026 the mc-transformers authors.
"""Checkpoints of training runs of this family into model folders, and models into plain state dicts."""

from collections.abc import Iterator
from pathlib import Path

import torch

from .. import MCConfig, MCForCausalLM
from ..hub.files import new_file, new_folder
from ..hub.inputs import check_ids, read_vocabulary
from ..hub.loading import load_model
from .checkpoint import copy_extras, read_config
from .convert import U_PROJ, write_model
from .reader import open_weights


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
OTHERS = ("optimizer", "optim", "optimizers", "lr_scheduler", "scheduler", "rng_state", "dataloader", "train_state")


def our_name(name: str, known: set[str]) -> str | None:
    """The model's name for a weight that a training script has stored under more prefixes; None = no weight at all.

    Raises:
        ValueError: the model has no such weight.
    """
    path = [part for part in name.split(".") if part not in WRAPPERS]
    if set(path[:2]) & set(OTHERS):
        return None
    for start in range(len(path)):
        for prefix in ([], ["model"]):  # the decoder alone may have been stored
            if ".".join(prefix + path[start:]) in known:
                return ".".join(prefix + path[start:])
    raise ValueError(f"the weight {name!r} is left over: a model of this config has nothing of that name")


def find_config(checkpoint: Path, config: str | Path | None = None) -> Path:
    """`config`, or the config.json in the checkpoint or in the folder above it.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    places = [Path(config)] if config else [folder / "config.json", folder.parent / "config.json"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no config for {checkpoint}: looked for {', '.join(map(str, places))} (give --config)")


def from_training(
    checkpoint: str | Path,
    output: str | Path,
    config: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    **fields,
) -> Path:
    """Write a model folder from what a training run has stored: a `torch.distributed.checkpoint` folder (as FSDP2
    writes it), a folder of accelerate or the Trainer, a state dict in one file, or a model folder.

    Args:
        checkpoint: the file or folder. output: folder to write; it appears when it is complete, and is returned.
        config: config.json of the run; by default beside the weights, or one folder up.
        dtype: of the weights; "auto" = as they are. max_shard_size: largest file of weights.
        overwrite: replace a folder that is there.
        fields: of the MCConfig that change, for example aggregation="mean" for caching after training.

    Raises:
        ValueError: a damaged file, code in a file, weights that are missing, left over or of a wrong shape,
            more tokens than the embedding has rows.
    """
    checkpoint = Path(checkpoint)
    place = find_config(checkpoint, config)
    found = read_config(place)
    if found.get("model_type") != MCConfig.model_type:
        raise ValueError(f"{place}: found model_type={found.get('model_type')!r}, supported: {MCConfig.model_type!r}")
    model_config = MCConfig.from_dict({**found, **fields})
    with torch.device("meta"):
        known = set(MCForCausalLM(model_config).state_dict())

    def parts() -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, tensor in open_weights(checkpoint):
            if (target := our_name(name, known)) is not None:
                yield name, target, tensor

    with new_folder(output, overwrite, checkpoint, place) as folder:
        zeros = (U_PROJ,) if "aggregation" in fields else ()
        write_model(folder, model_config, parts(), zeros, dtype, max_shard_size)
        copy_extras(place.parent, folder)
        check_ids(read_vocabulary(folder), model_config.vocab_size, place.parent)
    return Path(output)


def to_state_dict(checkpoint: str, output: str | Path, dtype: str = "auto", overwrite: bool = False) -> Path:
    """Write the weights of a model of this family as a plain dictionary of tensors, for `torch.load`.

    Args:
        checkpoint: folder or Hub name. output: file to write, which is returned. dtype: of the weights.
        overwrite: replace a file that is there.

    Raises:
        ValueError: the checkpoint does not load, or the output lies in it.
        FileExistsError: there is such a file already, or a folder or a link.
    """
    with new_file(output, overwrite, checkpoint) as file:
        torch.save(load_model(checkpoint, dtype).state_dict(), file)
    return Path(output)
