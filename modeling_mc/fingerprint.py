# Copyright 2026 the mc-transformers authors.
"""Which model a memory belongs to, as a hash of its config and weights."""

import hashlib
import json
import weakref

import torch
from torch import nn

from ..configuration_mc import MCConfig
from .limits import BORDER_FIELDS


# config entries that do not change what a model writes into its memory
IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "mc_backend",
    "transformers_version",
    "trained_as",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "tie_word_embeddings",
}
# Fields that an earlier version did not have: where they have their defaults they do not count, or its files would be
# refused.
LATER_FIELDS = ("online_memory", "online_gate_bias", "cached_answers", "cached_answers_start", *BORDER_FIELDS)
# written as if they were not set; the first files said how they were set
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLES = 256  # values per parameter that enter the fingerprints of format 1
COLUMNS = 1021  # sums that tell whether a parameter has changed since it was hashed
PIECE = 2**24  # values that are hashed at a time

# per model: what of its parameters can be compared at once, and the hash that they had
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's config and of names, shapes and all values of its parameters.

    Floats count by value: the same weights in another dtype that holds them exactly are the same. The weights are
    hashed once per model and again when a parameter was replaced or changed, which sums over all values tell.

    Raises:
        ValueError: not a model of this family, or its weights are not in memory, or split over processes.
    """
    digest = _hash_of_config(_config(model) | dict.fromkeys(TOKEN_IDS))
    digest.update(_hash_of_weights(model).encode())
    return digest.hexdigest()


def sampled_fingerprints(model: nn.Module) -> tuple[str, str]:
    """The fingerprints of format 1: up to 256 evenly spaced values of every parameter; in the second, special tokens
    count. Raises: as `fingerprint`."""
    config = _config(model)
    found = []
    for fields in (config | dict.fromkeys(TOKEN_IDS), config):
        digest = _hash_of_config(fields)
        _sample(model, digest)
        found.append(digest.hexdigest())
    return found[0], found[1]


def _config(model: nn.Module) -> dict:
    config = getattr(model, "config", None)
    if not all(hasattr(config, name) for name in LATER_FIELDS):
        raise ValueError(f"`model` must be a model of this family, got {type(model).__name__}")
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"`model`: the weights of {missing[0]} are not in memory (device 'meta')")
    if split := [name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")]:
        raise ValueError(f"`model`: the weights of {split[0]} are split over several processes: take a model in one")
    fields = {name: value for name, value in config.to_dict().items() if name not in IRRELEVANT}
    for name in LATER_FIELDS:
        if fields[name] == MCConfig.__dataclass_fields__[name].default:
            del fields[name]
    return fields


def _hash_of_config(config: dict):
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())


def _sample(model: nn.Module, digest) -> None:
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        place = torch.linspace(0, max(0, flat.numel() - 1), min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(flat[place.to(flat.device)].float().cpu().numpy().tobytes())


def _hash_of_weights(model: nn.Module) -> str:
    parameters = sorted(model.named_parameters())
    state = None
    if not any(p.is_inference() for _, p in parameters):  # those have no version
        sums = hashlib.sha256()
        for _, parameter in parameters:  # changes through `.data` have no version either
            sums.update(_sums(parameter))
        state = sums.digest(), tuple((n, id(p), p.data_ptr(), p.dtype, p._version) for n, p in parameters)
        if (known := _known.get(model)) is not None and known[0] == state:
            return known[1]
    digest = hashlib.sha256()
    for name, parameter in parameters:
        kind = "float" if parameter.is_floating_point() else str(parameter.dtype)
        digest.update(f"{name}{tuple(parameter.shape)}{kind}".encode())
        for piece in parameter.detach().reshape(-1).split(PIECE):
            digest.update(_bytes(piece.cpu()))
    if state is not None:
        _known[model] = state, digest.hexdigest()
    return digest.hexdigest()


def _sums(parameter: nn.Parameter) -> bytes:
    """Sums of the bits, every 1021st word of 8 bytes in one: some times faster than a hash, and only a change that is
    made for it leaves them as they are."""
    plain, small = torch.contiguous_format, parameter.numel() < COLUMNS  # a single value keeps any stride otherwise
    flat = parameter.detach().clone(memory_format=plain) if small else parameter.detach().contiguous()
    flat = flat.view(-1).view(torch.uint8)
    words = flat[: flat.numel() // (8 * COLUMNS) * 8 * COLUMNS]
    rest = flat[words.numel() :].cpu().numpy().tobytes()
    return words.view(torch.int64).view(-1, COLUMNS).sum(0).cpu().numpy().tobytes() + rest


def _bytes(piece: torch.Tensor) -> bytes:
    """The bytes of values `[n]` of any stride: as fp32 where that is exact."""
    if piece.is_floating_point() and piece.dtype != torch.float32:
        single = piece.float()
        piece = single if piece.dtype.itemsize < 4 or torch.equal(single.to(piece.dtype), piece) else piece
    return piece.numpy().tobytes()
