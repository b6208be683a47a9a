# Copyright 2026 the mc-transformers authors.
"""Files of a checkpoint, looked at before anything reads or copies them. What lies in one is data of somebody else."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath

import torch


CHAT_TEMPLATES = "additional_chat_templates"
JSON = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "added_tokens.json",
)
TEXT = ("merges.txt", "chat_template.jinja")
EXTRAS = (*JSON, *TEXT, "tokenizer.model")  # what is copied beside weights and config
NUMBERS = ("max_length", "max_new_tokens", "min_length", "temperature", "top_k", "top_p", "num_beams")  # of generation
LONGEST = 300  # characters of a value in a message


def short(value: object, limit: int = LONGEST) -> str:
    """`value` as text for a message, cut in the middle if it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


def _leads_out(name: str) -> bool:
    return PurePath(name).is_absolute() or ".." in PurePath(name).parts


def is_inside(folder: Path, name: str) -> bool:
    """Whether the file `name` of a checkpoint lies in its folder, also when links are followed; those of the Hub's
    cache lead from `snapshots/REVISION` to `blobs` beside it."""
    if _leads_out(name):
        return False
    folder = Path(os.path.realpath(folder))
    roots = [folder] + [parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"]
    found = Path(os.path.realpath(folder / name))
    return any(root in found.parents for root in roots)


def check_inside(folder: Path, names: Iterable[str], index: str = "") -> None:
    """
    Raises:
        ValueError: one of the files lies elsewhere. FileNotFoundError: it is missing.
    """
    where = f"{folder / index} names" if index else f"{folder} holds"
    for name in names:
        if not is_inside(folder, name):
            raise ValueError(f"{where} a file outside of its folder, or a link that leads out: {name} (copy it there)")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{where} {name}, which is not there")


def read_index(path: Path) -> list[str]:
    """Names of the shards in an index of Transformers.

    Raises:
        ValueError: no such index, or a name that leads elsewhere.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} is not an index of shards: `weight_map` must hold names of weights and files")
    for name in places.values():
        if not isinstance(name, str) or _leads_out(name):
            raise ValueError(f"{path} names a file outside of its folder, or none at all: {short(repr(name))}")
    return sorted(set(places.values()))


def read_json(path: Path, decode: Callable[[dict], object] | None = None) -> dict:
    """A JSON file that holds a dictionary.

    Args:
        decode: takes every dictionary in it and gives what stands in its place.

    Raises:
        ValueError: it is no JSON, or something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=decode)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({short(str(error))})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a dictionary, but {short(found, 60)}")
    return found


def check_extras(folder: Path) -> list[Path]:
    """What lies beside config and weights, fit to be copied: tokenizer, chat templates, generation config.

    Raises:
        ValueError: a file that lies elsewhere, is damaged, or names code that loading would run.
    """
    templates = sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    found = [path for path in (*(folder / name for name in EXTRAS), *templates) if path.is_file()]
    check_inside(folder, [str(path.relative_to(folder)) for path in found])
    for path in found:
        if path.name in JSON:
            content = read_json(path)
            if path.name == "generation_config.json":
                check_generation(path, content)
            if content.get("auto_map"):
                raise ValueError(
                    f"{path} names code of its own (auto_map), which is never run here: remove the entry if "
                    "Transformers has the tokenizer, else convert it to tokenizer.json"
                )
        elif path.name in TEXT or path in templates:
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    return found


def check_attention(name: str | Path, config: dict) -> None:
    """
    Raises:
        ValueError: an implementation of attention that would be fetched from the Hub.
    """
    for field in ("attn_implementation", "_attn_implementation"):
        value = config.get(field)
        if value is not None and not (isinstance(value, str) and "/" not in value):
            raise ValueError(f"{name}: `{field}`={short(repr(value))} is not valid, allowed: a name such as 'sdpa'")


def check_generation(path: Path, content: dict) -> None:
    """
    Raises:
        ValueError: a setting of generation that must be a number and is none.
    """
    for field in NUMBERS:
        value = content.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}: `{field}`={short(repr(value))} is not valid, allowed: a number")


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Tokens and their ids from the files of a tokenizer in `folder`; what is no id is left out.

    Raises:
        ValueError: a file that is not JSON.
    """
    found = {}
    for name in ("vocab.json", "tokenizer.json", "added_tokens.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        if name == "tokenizer.json":
            model, added = content.get("model"), content.get("added_tokens")
            content = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(content, list):  # of Unigram: the place is the id
                found |= {
                    str(token[0]): place for place, token in enumerate(content) if isinstance(token, list) and token
                }
            added = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else ()
            found |= {str(token.get("content")): token.get("id") for token in added}
        found |= content if isinstance(content, dict) else {}
    return {token: place for token, place in found.items() if type(place) is int}


def check_ids(vocabulary: dict[str, int], vocab_size: int, name: str | Path) -> None:
    """
    Raises:
        ValueError: a token that the embedding has no row for.
    """
    token, place = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if place >= vocab_size:
        raise ValueError(
            f"{name}: the tokenizer gives {short(token, 60)!r} the id {place}, and the embedding has {vocab_size} "
            "rows (`vocab_size`): take the token out of the tokenizer, or resize the embedding"
        )


def check_weight(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        ValueError: a weight of a kind that the family does not compute with, or one that is not finite.
    """
    check_dtype(name, tensor.dtype)
    if not tensor.isfinite().all():
        raise ValueError(f"the weight {name!r} holds NaN or infinite values")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: weights of another kind than fp64, fp32, fp16 and bf16.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"the weight {name!r} is quantised or no real number ({dtype}), allowed: fp32, fp16 or bf16")
