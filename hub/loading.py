# Copyright 2026 the mc-transformers authors.
"""Checkpoints of this family for the command line: loaded whole, or refused with a reason."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_files

from ..configuration_mc import PRESETS, MCConfig
from ..modeling_mc import model as family
from ..modeling_mc.registration import AUTO_CLASSES
from .inputs import (
    EXTRAS,
    check_attention,
    check_dtype,
    check_extras,
    check_generation,
    check_ids,
    check_inside,
    check_weight,
    read_index,
    read_json,
    short,
)


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
HEADS = {name: getattr(family, name) for name in AUTO_CLASSES}
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in the order in which Transformers looks for them


def load_config(name: str, revision: str | None = None, presets: bool = False) -> MCConfig:
    """Config of a checkpoint: a folder or a Hub repository, or with `presets` also the name of a published size.

    Raises:
        ValueError: the checkpoint is of another architecture. OSError: there is no such checkpoint.
    """
    if presets and not Path(name).exists() and name in (path.stem for path in PRESETS.glob("*.json")):
        return MCConfig.from_preset(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        adapter = (Path(name) / "adapter_config.json").is_file()
        hint = ": it is an adapter of PEFT, merge it into its model first" if adapter else ""
        raise OSError(f"{name} holds no config.json{hint}")
    if Path(name).is_dir():
        read_json(Path(name) / "config.json")
    try:
        found, _ = MCConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # all of it: what to do stands at the end
        raise OSError(
            f"{name} is neither a folder with a readable config.json nor a Hub repository ({reason})"
        ) from error
    if found.get("model_type") != MCConfig.model_type:
        kind = f"model_type={found.get('model_type')!r}, architectures={found.get('architectures')}"
        raise ValueError(
            f"{name} is a checkpoint of another architecture ({kind}), supported: model_type={MCConfig.model_type!r}. "
            "`mc-transformers convert --help` lists what can be converted"
        )
    _check_config(name, found)
    return MCConfig.from_pretrained(name, revision=revision)


def _check_config(name: str, found: dict) -> None:
    """
    Raises:
        ValueError: a dtype that there is not, or another implementation of attention than those of Transformers, which
            would be fetched from the Hub.
    """
    for field in ("dtype", "torch_dtype"):
        if found.get(field) is not None and str(found[field]).removeprefix("torch.") not in DTYPES[1:]:
            raise ValueError(
                f"{name}: `{field}`={short(repr(found[field]))} is not valid, allowed: {', '.join(DTYPES[1:])}"
            )
    check_attention(name, found)
    kinds = found.get("architectures") or []
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"{name}: `architectures`={short(repr(kinds))} is not valid, allowed: a list of names")
    if found.get("transformers_weights") is not None:
        raise ValueError(f"{name}: `transformers_weights` is not supported, rename the file to {WEIGHTS[0]}")
    if not isinstance(found.get("quantization_config") or {}, dict):
        value = short(repr(found["quantization_config"]))
        raise ValueError(f"{name}: `quantization_config`={value} is not valid, allowed: a dictionary")


def _fetch(name: str, files: list[str], revision: str | None) -> list[Path]:
    """Those of the files that a checkpoint has, in a folder or in the Hub's cache."""
    found = cached_files(name, files, revision=revision, _raise_exceptions_for_missing_entries=False)
    return [Path(file) for file in found or () if file]


def _check_weights(name: str, revision: str | None) -> None:
    """Without reading the numbers.

    Raises:
        ValueError: a weight of an unknown kind, or an index that is damaged or names files elsewhere.
    """
    files = _fetch(name, [WEIGHTS[0]], revision)
    if not files and (index := _fetch(name, [WEIGHTS[1]], revision)):
        shards = read_index(index[0])
        files = _fetch(name, shards, revision)
        check_inside(index[0].parent, shards, WEIGHTS[1])
    for file in files:
        with safe_open(file, "pt") as opened:
            for weight in opened.keys():
                kind = opened.get_slice(weight).get_dtype()
                check_dtype(f"{weight} of {file}", SAFETENSORS.get(kind, torch.uint8))


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", revision: str | None = None, head: str | None = None
) -> PreTrainedModel:
    """Model in evaluation mode, of the class that the config names (or `head`), with this package's own code.

    Raises:
        ValueError: another architecture, a damaged file, or weights that are missing or not used.
    """
    config = load_config(name, revision)
    quantised = getattr(config, "quantization_config", None) is not None  # Transformers knows the kinds of its own
    head = head or (config.architectures or ["MCForCausalLM"])[0]
    if head not in HEADS:
        raise ValueError(f"{name}: architecture {head!r} is not known, supported: {', '.join(sorted(HEADS))}")
    try:
        if not quantised:
            _check_weights(name, revision)
        for file in _fetch(name, ["generation_config.json"], revision):
            check_generation(file, read_json(file))
        model, report = HEADS[head].from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the report names them
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{name}: a weights file is damaged or cut off ({error})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            keys = sorted(map(str, report[what]))
            raise ValueError(f"{name}: {len(keys)} {what.replace('_', ' ')}, for example {', '.join(keys[:3])}")
    try:
        for weight, tensor in () if quantised else model.state_dict().items():
            check_weight(weight, tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return model.to(device).eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint.

    Raises:
        ValueError: there is none, it has more tokens than the embedding, or the checkpoint is of another architecture.
    """
    config = load_config(name, revision)
    if files := _fetch(name, list(EXTRAS), revision):
        check_extras(files[0].parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizer's own library has but one class of errors
        raise ValueError(f"{name} has no tokenizer that loads ({short(' '.join(str(error).split()))})") from error
    check_ids(tokenizer.get_vocab(), config.vocab_size, name)
    return tokenizer


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
