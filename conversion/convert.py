# Copyright 2026 the mc-transformers authors.
"""Conversion into the family: a config, a table of names, and nothing that is left over on either side."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .. import MCConfig, MCForCausalLM, MCModel
from ..configuration_mc import LARGEST, LAYER_TYPE
from ..hub.bundle import write_code
from ..hub.files import new_folder
from ..hub.flat import AUTO_MAP
from ..hub.inputs import check_ids, check_weight, read_vocabulary, short
from ..modeling_mc.mixer import MCMixer
from .checkpoint import Checkpoint, open_checkpoint
from .source import Source, refuse
from .sources import SOURCES
from .writer import ShardWriter


SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
TOLERANCE = 1e-4
U_PROJ = ".mixer.u_proj.weight"


def find_source(found: dict, name: str | None = None) -> Source:
    """The kind of a checkpoint, from its config.json, or the one that `name` asks for.

    Raises:
        ValueError: none fits; the message says what was found and what is supported.
    """
    if name is not None and name not in SOURCES:
        raise ValueError(f"--from {name} is not known, allowed: {', '.join(SOURCES)}")
    for source in SOURCES.values():
        if found.get("model_type") in source.model_types and name in (None, source.name, *source.aliases):
            return source
    supported = "; ".join(f"{source.name}: {', '.join(source.model_types)}" for source in SOURCES.values())
    wanted = f" with --from {name}" if name else ""
    raise ValueError(
        f"found model_type={found.get('model_type')!r}, architectures={found.get('architectures')}{wanted}; "
        f"supported: {supported}"
    )


def _fp32_names(model: MCForCausalLM) -> set[str]:
    kept = set(model.model._keep_in_fp32_modules_strict or ())
    return {name for name in model.state_dict() if kept & set(name.split("."))}


def convert(
    checkpoint: str | Path,
    output: str | Path,
    source: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = False,
    layers: Sequence[int] | None = None,
    **fields,
) -> Path:
    """Convert a checkpoint folder, tensor by tensor.

    Weights that the source does not have (the projection of content gates) start at zero: all gates are equal, so that
    "grm" starts as "mean" does, and with one segment as the source itself.

    Args:
        checkpoint: folder with config.json and weights. output: folder to write; it appears when it is complete.
        source: name of the source format; by default what config.json says.
        dtype: of the weights; "auto" = as they are. Decay rates, gate biases and skips are always fp32.
        max_shard_size: largest file of weights. overwrite: replace a folder that is there.
        verify: compare the logits with the source's, where they can be the same.
        layers: numbers of the layers of a Transformer that become memory layers.
        fields: of the MCConfig, for example aggregation and segment_size.

    Returns:
        `output`.

    Raises:
        FileExistsError: there is such an output, and not `overwrite`.
        ValueError: another architecture, a missing piece, weights that are missing, left over, quantised or of a
            wrong shape, more tokens than the embedding has rows, `fields` for a result without memory layers, an
            output that is the checkpoint.
    """
    checkpoint = open_checkpoint(checkpoint)
    with wrong_values(checkpoint.path):
        found = checkpoint.config
        for each in SOURCES.values():
            found = each.translate(found)
        kind = find_source(found, source)
        _check_sizes(checkpoint.path, found)
    if (quantised := found.pop("quantization_config", None)) and not _is_undone(quantised):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else short(repr(quantised))
        refuse("quantised weights (quantization_config)", method, "fp32, fp16 or bf16")
    if verify and dtype not in ("auto", "float32", "float64"):
        raise ValueError(f"--verify-logits: weights rounded by --dtype {dtype} have other logits, leave one out")
    if layers:
        kind = _with_memory_layers(kind, layers, verify)
    theirs = None
    if found["model_type"] in CONFIG_MAPPING:  # with the defaults of Transformers
        with wrong_values(checkpoint.path):
            theirs = CONFIG_MAPPING[found["model_type"]].from_dict(found)
            found = theirs.to_dict()
    elif verify:
        missing = f"Transformers has no model_type={found['model_type']!r} to compare with"
        raise ValueError(f"--verify-logits: {missing} (a package that registers it can be imported first)")
    with wrong_values(checkpoint.path):
        config = MCConfig(**{"aggregation": "none", **kind.make_config(found), **fields})
    if fields and LAYER_TYPE not in config.layer_types:
        raise ValueError(f"{', '.join(fields)}: the result has no memory layer, choose some with --layers")

    def parts() -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, tensor in kind.merged(weights):
            targets, split = kind.targets(name, found)
            for target, part in zip(targets, split(tensor, found) if targets else (), strict=True):
                yield name, target, part

    with new_folder(output, overwrite, checkpoint.path) as folder:
        weights = checkpoint.weights()
        write_model(folder, config, parts(), (U_PROJ, *kind.zeros), dtype, max_shard_size, kind.fresh)
        checkpoint.copy_extras(folder)
        check_ids(read_vocabulary(folder), config.vocab_size, checkpoint.path)
        if verify:
            verify_logits(checkpoint, folder, theirs, kind.names)
    return Path(output)


def _check_sizes(path: Path, found: dict) -> None:
    """Before Transformers builds anything of them, a list of all layers for example.

    Raises:
        ValueError: more than a model can have.
    """
    for field, largest in LARGEST.items():
        if isinstance(found.get(field), int | float) and not found[field] <= largest:
            raise ValueError(f"{path}: `{field}`={short(repr(found[field]))} is not valid, allowed: <= {largest}")


@contextmanager
def wrong_values(path: Path) -> Iterator[None]:
    """Of a config that somebody else has written: any value may be missing or of any type.

    Raises:
        ValueError: where code that reads it stumbled over one.
    """
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: config.json lacks a value, or has one of a wrong kind ({short(str(error))})"
        ) from error


def _is_undone(quantised: dict) -> bool:
    """Whether a quantization_config is what loading leaves in the config of a model that it has unpacked. GGUF is
    never saved in a folder. Weights that are quantised all the same are refused one by one."""
    if not isinstance(quantised, dict):
        return False
    return quantised.get("quant_method") == "gguf" or quantised.get("dequantize") is True


def _with_memory_layers(kind: Source, layers: Sequence[int], verify: bool) -> Source:
    if kind.with_memory_layers is None:
        able = " or ".join(f"--from {source.name}" for source in SOURCES.values() if source.with_memory_layers)
        raise ValueError(f"layers={list(layers)} can be chosen with {able} only, not {kind.name}")
    if verify:
        raise ValueError("--verify-logits: a model whose attention layers became memory layers is not the source")
    return kind.with_memory_layers(layers)


def write_model(
    folder: Path,
    config: MCConfig,
    parts: Iterable[tuple[str, str, torch.Tensor]],
    zeros: tuple[str, ...],
    dtype: str,
    max_shard_size: str,
    fresh: bool = False,
) -> None:
    """Write config, weights and code from (name in the source, our name, tensor).

    Args:
        zeros: ends of the names of weights that may be missing, and are zero then.
        fresh: other weights of mixers may be missing too, and start as in a new model.

    Raises:
        ValueError: weights that are missing, left over or of a wrong shape.
    """
    with torch.device("meta"):
        model = MCForCausalLM(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    fp32, chosen, written = _fp32_names(model), None if dtype == "auto" else getattr(torch, dtype), {}
    writer = ShardWriter(folder, max_shard_size)
    for name, target, part in tqdm(parts, desc="convert", unit="tensor"):
        if target in tied:
            continue
        _check(name, target, part, wanted, written)
        written[target] = torch.float32 if target in fp32 else chosen or part.dtype
        writer.add(target, part.to(written[target], copy=True))
    missing = sorted(set(wanted) - set(written) - tied)
    new = _new_mixers(config, missing) if fresh else {}
    if left := [name for name in missing if not name.endswith(zeros) and name not in new]:
        raise ValueError(f"the checkpoint lacks {len(left)} weights, for example what gives {left[0]!r}")
    common = chosen or written["model.embed_tokens.weight"]
    for name in missing:
        start = torch.zeros(wanted[name]) if name.endswith(zeros) else new[name]
        writer.add(name, start.to(torch.float32 if name in fp32 else common))
    writer.close()
    config.dtype = str(common).removeprefix("torch.")
    config.architectures, config.auto_map = ["MCForCausalLM"], dict(AUTO_MAP)
    config.save_pretrained(folder)
    write_code(folder)


def new_mixer(config: MCConfig, layer: int) -> MCMixer:
    """The mixer of a memory layer as it starts in a new model, the same in every call."""
    alone = {"num_hidden_layers": 1, "layer_types": [LAYER_TYPE], "intermediate_size": 0, "vocab_size": 1}
    small = MCConfig.from_dict(config.to_dict() | alone | dict.fromkeys(SPECIAL))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer)
        return MCModel(small).layers[0].mixer


def _new_mixers(config: MCConfig, missing: list[str]) -> dict[str, torch.Tensor]:
    """The start of all weights of the mixers to which `missing` weights belong."""
    found = {}
    for layer in sorted({name.split(".")[2] for name in missing if ".mixer." in name}):
        mixer = new_mixer(config, int(layer))
        found |= {f"model.layers.{layer}.mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    return found


def _check(name: str, target: str, part: torch.Tensor, wanted: dict, written: dict) -> None:
    check_weight(name, part)
    if target not in wanted:
        raise ValueError(f"the weight {name!r} is left over: a model of this config has no {target!r}")
    if target in written:
        raise ValueError(f"the weight {name!r} would fill {target!r} a second time")
    if part.shape != wanted[target]:
        shapes = f"{tuple(part.shape)}, not {tuple(wanted[target])}"
        raise ValueError(f"the weight {name!r} gives {target!r} of shape {shapes}")


@torch.no_grad()
def verify_logits(
    checkpoint: Checkpoint,
    converted: str | Path,
    config: PreTrainedConfig | None = None,
    names: dict[str, str] | None = None,
) -> float:
    """Largest difference of the logits in fp32 on random tokens, fewer than a segment.

    Args:
        config, names: of the source, where its config.json and its names are not those of Transformers.

    Raises:
        RuntimeError: it is larger than 1e-4.
    """
    ours = MCForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    theirs = checkpoint.load(config, names)
    length = 64 if ours.config.aggregation == "none" else min(64, ours.config.segment_size)
    ids = torch.randint(0, ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    difference = (ours(ids).logits - theirs.eval()(ids).logits).abs().max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the converted model's logits differ by {difference:.1e}, allowed: {TOLERANCE:.0e}")
    return difference
