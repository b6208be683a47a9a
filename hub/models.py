# Copyright 2026 the mc-transformers authors.
"""What the package puts in the place of two methods of its models, so that whatever is saved or pushed, by hand or by
a Trainer, is a repository that loads anywhere. A bundle's own classes do not need them: Transformers copies its code.
"""

import os
import tempfile

from transformers import PreTrainedModel

from .flat import AUTO_MAP


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    **kwargs,
) -> None:
    """`PreTrainedModel.save_pretrained`, which see, and the code files that load the folder without this package."""
    from .bundle import write_code

    if push_to_hub:
        names = ("repo_id", "commit_message", "create_pr", "private", "revision", "token")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
    adapter_only = getattr(self, "_hf_peft_config_loaded", False)
    if not adapter_only:
        self.config.auto_map = dict(AUTO_MAP)
    PreTrainedModel.save_pretrained(self, save_directory, is_main_process, state_dict, **kwargs)
    if is_main_process and not adapter_only and os.path.isdir(save_directory):
        write_code(save_directory)
    if push_to_hub and is_main_process:
        hub["max_shard_size"] = kwargs.get("max_shard_size", "50GB")
        hub.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
        self.push_to_hub(**hub)


def push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
):
    """`PreTrainedModel.push_to_hub`, which see, with a card of this family where the repository has none yet."""
    from .bundle import write_bundle
    from .card import Metadata
    from .publish import upload

    if getattr(self, "_hf_peft_config_loaded", False):  # an adapter is not a repository of its own
        options = dict(
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )
        return PreTrainedModel.push_to_hub(self, repo_id, **options)
    tags = [tags] if isinstance(tags, str) else tags or []
    metadata = Metadata(tags=list(dict.fromkeys([*(self.model_tags or []), *tags])))
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(self, folder, repo_id, max_shard_size=max_shard_size, metadata=metadata)
        return upload(
            folder,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
        )
