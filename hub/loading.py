# Copyright 2026 the mc-transformers authors.
"""Checkpoints of this family for the command line: loaded whole, or refused with a reason."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_mc import PRESETS, MCConfig
from ..modeling_mc import model as family
from ..modeling_mc.registration import AUTO_CLASSES


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
HEADS = {name: getattr(family, name) for name in AUTO_CLASSES}


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
    return MCConfig.from_pretrained(name, revision=revision)


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", revision: str | None = None, head: str | None = None
) -> PreTrainedModel:
    """Model in evaluation mode, of the class that the config names (or `head`), with this package's own code.

    Raises:
        ValueError: another architecture, a damaged file, or weights that are missing or not used.
    """
    config = load_config(name, revision)
    head = head or (config.architectures or ["MCForCausalLM"])[0]
    if head not in HEADS:
        raise ValueError(f"{name}: architecture {head!r} is not known, supported: {', '.join(sorted(HEADS))}")
    try:
        model, report = HEADS[head].from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{name}: a weights file is damaged or cut off ({error})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            keys = sorted(map(str, report[what]))
            raise ValueError(f"{name}: {len(keys)} {what.replace('_', ' ')}, for example {', '.join(keys[:3])}")
    return model.to(device).eval()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint.

    Raises:
        ValueError: there is none, or the checkpoint is of another architecture.
    """
    load_config(name, revision)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} has no tokenizer that loads ({' '.join(str(error).split())})") from error


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
