# Copyright 2026 the mc-transformers authors.
"""`save_pretrained` and `push_to_hub` of our models: what they save or push, by hand or by a Trainer, is a repository
that loads anywhere. The copies of our models in a repository do without: Transformers copies their code itself.
"""

import os
import re
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .bundle import write_bundle, write_code
from .card import Metadata
from .files import scratch
from .flat import AUTO_MAP
from .publish import upload


def is_adapter(model: PreTrainedModel) -> bool:
    """Whether saving writes an adapter of PEFT only, which is not a repository of its own."""
    return getattr(model, "_hf_peft_config_loaded", False)


def is_training_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is named as the Trainer names those to resume from: many, for the program that wrote them."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name) is not None


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    is_main_process: bool,
    state_dict: dict | None,
    push_to_hub: bool,
    with_code: bool | None,
    **kwargs,
) -> None:
    """See `MCPreTrainedModel.save_pretrained`."""
    if push_to_hub:
        names = ("repo_id", "commit_message", "create_pr", "private", "revision", "token")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
    if with_code is None:
        with_code = not is_training_checkpoint(folder)
    if is_adapter(model):
        with_code = False
    elif with_code:
        model.config.auto_map = dict(AUTO_MAP)
    else:  # which would name files that are not there
        vars(model.config).pop("auto_map", None)
    PreTrainedModel.save_pretrained(model, folder, is_main_process, state_dict, **kwargs)
    if is_main_process and with_code and os.path.isdir(folder):
        write_code(folder)
    if push_to_hub and is_main_process:
        hub["max_shard_size"] = kwargs.get("max_shard_size", "50GB")
        hub.setdefault("repo_id", os.path.basename(os.path.normpath(folder)))
        model.push_to_hub(**hub)


def push(
    model: PreTrainedModel,
    repo_id: str,
    commit_message: str | None = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **options,
) -> CommitInfo | str:
    """See `MCPreTrainedModel.push_to_hub`."""
    if is_adapter(model):
        return PreTrainedModel.push_to_hub(model, repo_id, commit_message=commit_message, tags=tags, **options)
    tags = [tags] if isinstance(tags, str) else tags or []
    metadata = Metadata(tags=list(dict.fromkeys([*(model.model_tags or []), *tags])))
    with scratch() as folder:
        write_bundle(model, folder, repo_id, max_shard_size=max_shard_size, metadata=metadata)
        return upload(folder, repo_id, commit_message=commit_message or "Upload model", **options)
