# Copyright 2026 the mc-transformers authors.
"""From a checkpoint to a Hub repository that loads anywhere: bundle, check, upload."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from .bundle import bundle
from .card import Metadata, Result
from .figure import FIGURE
from .files import scratch
from .inputs import short


CARD = "README.md"
REPLACED = ["*.py", "*.safetensors", "*.safetensors.index.json"]  # of an earlier version: deleted where not replaced

TOKEN = re.compile(r"(hf_(oauth_)?|api_org_)[A-Za-z0-9]{20,}")  # what tokens of the Hub look like


def hide_tokens(text: str) -> str:
    """`text` without the user's token, and without whatever else looks like one."""
    token = get_token()
    return TOKEN.sub("***", text.replace(token, "***") if token else text)


def check_upload(
    repo_id: str,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
) -> None:
    """What can be known before the work.

    Raises:
        ValueError: no name of a repository, a token in its place, a token that cannot be one, or arguments that
            exclude each other.
    """
    if hide_tokens(repo_id) != repo_id:
        raise ValueError("the repository's name holds an access token (not shown): give NAME or OWNER/NAME")
    validate_repo_id(repo_id)
    if not (token if isinstance(token, str) else get_token() or "").isascii():
        raise ValueError("the access token (HF_TOKEN, or what `hf auth login` saved) has characters that no token has")
    if create_pr and (tag or revision):
        raise ValueError("a pull request (create_pr) goes to the default branch and has no tag: leave out the others")


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    token: bool | str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    replace_card: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a complete folder; the repository and the branch are created where they are missing.

    Data that an interrupted call has sent is not sent again. A card that the repository already has stays, unless
    `replace_card`, because people edit cards.

    Args:
        revision: a branch, or `refs/pr/N` to add to a pull request. tag: a name for the new commit.

    Raises:
        ValueError: see `check_upload`, or `private` for a repository that is public. RuntimeError: an answer that the
            Hub never gives.
        huggingface_hub.errors.HfHubHTTPError: what the Hub refuses.
    """
    check_upload(repo_id, token, revision, create_pr, tag)
    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"the repository {repo_id} exists and is public: nothing was uploaded")
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep_card = not replace_card and api.file_exists(repo_id, CARD, revision=revision)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=REPLACED,
            ignore_patterns=[CARD, FIGURE] if keep_card else None,
            commit_message=commit_message,
            commit_description=commit_description,
        )
        if tag:
            api.create_tag(repo_id, tag=tag, revision=info.oid)
        return info
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        reason = short(" ".join(str(error).split()))
        raise RuntimeError(f"an answer to the upload of {repo_id} is none of the Hub's ({reason})") from error


def publish(
    checkpoint: str,
    repo_id: str,
    *,
    dry_run: bool = False,
    max_shard_size: str = "5GB",
    metadata: Metadata | None = None,
    results: Sequence[Result] = (),
    **options,
) -> tuple[dict[str, int], CommitInfo | None]:
    """Bundle a checkpoint, load the bundle in a process of its own and compare, upload it.

    Args:
        dry_run: stop before the upload. options: see `upload`.

    Returns:
        the files and their sizes, and the commit (None with `dry_run`).

    Raises:
        ValueError: see `check_upload`, before the work. Else as `bundle` and `upload`.
    """
    check_upload(repo_id, *(options.get(name) for name in ("token", "revision", "create_pr", "tag")))
    with scratch() as temporary:
        folder = bundle(
            checkpoint,
            temporary / "bundle",
            repo_id,
            max_shard_size=max_shard_size,
            metadata=metadata,
            results=results,
        )
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        return files, None if dry_run else upload(folder, repo_id, **options)
