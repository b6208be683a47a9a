# Copyright 2026 the mc-transformers authors.
"""GGUF files, loaded by Transformers, which unpacks their weights; what its loading would leave out is refused.

Transformers reads a GGUF file of a Llama without a word about what it does not know: scaled rotary angles
(`rope_freqs.weight`, `llama.rope.scaling.*`), biases, experts, keys and values whose number of heads is not said. The
result would be another model than the file's. So everything in the file must have been used, as in any conversion.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_gguf_available, logging


MAGIC = b"GGUF"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
NEEDED = ("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")
TOKENIZERS = ("gpt2", "llama")
TOKENS = "tokenizer.ggml.tokens"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
VERSION = "0.17"


def is_gguf(path: str | Path) -> bool:
    """Whether a file says that it is GGUF, by its name or by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    return path.suffix.lower() == ".gguf" or _first_bytes(path) == MAGIC


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def _open(path: Path):
    """The file's `gguf.GGUFReader`.

    Raises:
        ImportError: the package `gguf` is missing. ValueError: not a GGUF file, or a damaged one.
    """
    if (found := _first_bytes(path)) != MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it begins with {found!r}, not {MAGIC!r}")
    if not is_gguf_available(VERSION):
        raise ImportError(f"reading GGUF needs the package gguf >= {VERSION}: pip install 'mc-transformers[gguf]'")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # it trusts the counts in the file, and fails wherever they lead
        raise ValueError(f"{path} is damaged, cut off, or of an unknown version of GGUF ({error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' report of weights that do not fit, which is an error here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class GGUFFile:
    """A GGUF file of a Llama, Qwen2 or Qwen3. See `checkpoint.Checkpoint`.

    Raises:
        ImportError: the package `gguf` is missing. ValueError: a damaged file, another architecture, metadata that
            is missing, or that Transformers does not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader = _open(self.path)
        self._check_metadata()
        self._place = {"pretrained_model_name_or_path": self.path.parent, "gguf_file": self.path.name}
        self._config = AutoConfig.from_pretrained(**self._place, trust_remote_code=False)
        self.config = self._config.to_dict()

    def _value(self, name: str) -> object:
        """A value of the metadata, or None."""
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()

    def _check_metadata(self) -> None:
        kind = self._value("general.architecture")
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: found general.architecture={kind!r}, supported as GGUF: {', '.join(ARCHITECTURES)}"
            )
        if missing := [name for name in NEEDED if self._value(f"{kind}.{name}") is None]:
            raise ValueError(f"{self.path} lacks {kind}.{missing[0]}: the attention layers cannot be rebuilt")
        scaled = [name for name in self._reader.fields if name.startswith(f"{kind}.rope.scal")]
        if scaled and self._value(f"{kind}.rope.scaling.type") != "none":
            raise ValueError(
                f"{self.path} scales rotary angles ({scaled[0]}), which Transformers does not read of GGUF"
            )
        if TOKENS in self._reader.fields and (found := self._value("tokenizer.ggml.model")) not in TOKENIZERS:
            raise ValueError(f"{self.path}: found tokenizer.ggml.model={found!r}, supported: {', '.join(TOKENIZERS)}")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The file in Transformers, in fp32 and unpacked.

        Raises:
            ValueError: weights that are missing, left over or of a wrong shape.
        """
        options = {
            "dtype": torch.float32,
            "trust_remote_code": False,
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
        }
        if hasattr(transformers, "GgufConfig"):  # since 5.24 weights may stay packed otherwise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(**self._place, config=self._config, **options)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{self.path} lacks {len(missing)} weights, for example what gives {missing[0]!r}")
        if other := sorted(report["mismatched_keys"]):
            name, found, wanted = other[0]
            shapes = f"{tuple(found)}, by the metadata of the file it is {tuple(wanted)}"
            raise ValueError(f"{self.path}: the shape of {name!r} is {shapes}")
        if left := sorted({tensor.name for tensor in self._reader.tensors} - self._names_of(model)):
            raise ValueError(
                f"{self.path}: {len(left)} weights are left over, for example {left[0]!r}: Transformers has no place "
                f"for them in a {self.config['model_type']} model of GGUF"
            )
        return model.eval()

    def _names_of(self, model: PreTrainedModel) -> set[str]:
        """What GGUF calls the weights of a model."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        kind = numbers[self._value("general.architecture")]
        names = get_tensor_name_map(kind, model.config.num_hidden_layers)
        parts = (name.rpartition(".") for name in model.state_dict())
        return {f"{names.get_name(stem)}.{end}" for stem, _, end in parts}

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.model.state_dict().items()

    def copy_extras(self, folder: Path) -> None:
        self.model.generation_config.save_pretrained(folder)
        if TOKENS not in self._reader.fields:
            return
        tokenizer = AutoTokenizer.from_pretrained(**self._place, trust_remote_code=False)
        for name, key in SPECIAL.items():  # before Transformers 5.24 the last token was the first one's twin
            if (number := self._value(f"tokenizer.ggml.{key}_token_id")) is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(number)))
        tokenizer.save_pretrained(folder)

    def load(self, config: PreTrainedConfig | None, names: dict[str, str] | None) -> PreTrainedModel:
        return self.model
