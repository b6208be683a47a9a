# Copyright 2026 the mc-transformers authors.
"""Conversion into the family: a config, a table of names, and nothing that is left over on either side."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .. import MCConfig, MCForCausalLM, MCModel
from ..configuration_mc import LAYER_TYPE
from ..hub.bundle import write_code
from ..hub.files import new_folder
from ..hub.flat import AUTO_MAP
from .checkpoint import Checkpoint, open_checkpoint
from .writer import ShardWriter


# one source tensor, the config of the source, and the tensors for the rule's targets
Split = Callable[[torch.Tensor, dict], Sequence[torch.Tensor]]
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
TOLERANCE = 1e-4
U_PROJ = ".mixer.u_proj.weight"


def keep(tensor: torch.Tensor, found: dict) -> Sequence[torch.Tensor]:
    return (tensor,)


@dataclass(frozen=True)
class Source:
    """A kind of checkpoint that can be converted.

    Attributes:
        name: for `--from`, as `aliases` are. model_types: what its config.json says.
        make_config: config.json as a dictionary to the fields of an MCConfig; raises ValueError for what is missing.
        rules: (pattern of a whole name, target names with groups, split), the first that matches counts; the names
            may be a function of the match and the source's config; none = the weight is not needed.
        zeros: ends of the names of weights that the source has not, because they are zero there.
        merges: (pattern with one group `part`, its values in order): such weights are joined along their rows to one
            whose name lacks the part, and only then looked up in the rules.
        fresh: what is missing in a mixer starts as in a new model.
        names: patterns of names that Transformers knows under others, for `verify_logits`.
    """

    name: str
    model_types: tuple[str, ...]
    make_config: Callable[[dict], dict]
    rules: tuple[tuple[str, tuple[str, ...] | Callable[[re.Match, dict], list[str]], Split], ...]
    zeros: tuple[str, ...] = ()
    merges: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fresh: bool = False
    names: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def targets(self, name: str, found: dict) -> tuple[list[str], Split]:
        """Target names of a source tensor.

        Raises:
            ValueError: no rule knows it.
        """
        for pattern, targets, split in self.rules:
            if match := re.fullmatch(pattern, name):
                names = targets(match, found) if callable(targets) else map(match.expand, targets)
                return list(names), split
        raise ValueError(
            f"no rule of --from {self.name} knows the weight {name!r}: this is another kind of checkpoint, or has a "
            "head that language models have not"
        )

    def merged(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights` with what belongs together joined.

        Raises:
            ValueError: a part is missing.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            for pattern, order in self.merges:
                if match := re.fullmatch(pattern, name):
                    start, stop = match.span("part")
                    whole = name[:start] + name[stop:]
                    parts = waiting.setdefault(whole, {})
                    parts[match["part"]] = tensor
                    if len(parts) == len(order):
                        yield whole, torch.cat([waiting[whole][part] for part in order])
                        del waiting[whole]
                    break
            else:
                yield name, tensor
        if waiting:
            name = min(waiting)
            raise ValueError(f"the checkpoint lacks parts of {name!r}: it has {', '.join(waiting[name])}")


def refuse(piece: str, value: object, allowed: str) -> None:
    """What a checkpoint has and the family has not.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"this checkpoint has {piece} ({value!r}), which the family has not; supported: {allowed}")


def sources() -> dict[str, Source]:
    """All kinds by name."""
    from .sources import fla_gated_deltanet as from_fla_gated_deltanet
    from .sources import fla_linear as from_fla_linear
    from .sources import llama as from_llama
    from .sources import mamba2 as from_mamba2
    from .sources import olmo_hybrid as from_olmo_hybrid
    from .sources import qwen as from_qwen
    from .sources import retnet as from_retnet

    delta = (from_fla_gated_deltanet, from_olmo_hybrid, from_qwen)
    modules = (from_mamba2, from_fla_linear, from_retnet, *delta, from_llama)
    return {module.SOURCE.name: module.SOURCE for module in modules}


def find_source(found: dict, name: str | None = None) -> Source:
    """The kind of a checkpoint, from its config.json, or the one that `name` asks for.

    Raises:
        ValueError: none fits; the message says what was found and what is supported.
    """
    known = sources()
    if name is not None and name not in known:
        raise ValueError(f"--from {name} is not known, allowed: {', '.join(known)}")
    for source in known.values():
        if found.get("model_type") in source.model_types and name in (None, source.name, *source.aliases):
            return source
    supported = "; ".join(f"{source.name}: {', '.join(source.model_types)}" for source in known.values())
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

    Weights that the source has not (the projection of content gates) start at zero: all gates are equal then, so that
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
            wrong shape, `fields` for a result without memory layers, an output that is the checkpoint.
    """
    from .sources.mamba2 import in_terms_of_transformers

    checkpoint = open_checkpoint(checkpoint)
    found = in_terms_of_transformers(checkpoint.config)
    kind = find_source(found, source)
    if (quantised := found.pop("quantization_config", None)) and not _is_undone(quantised):
        refuse("quantised weights (quantization_config)", quantised.get("quant_method"), "fp32, fp16 or bf16")
    if verify and dtype not in ("auto", "float32", "float64"):
        raise ValueError(f"--verify-logits: weights rounded by --dtype {dtype} have other logits, leave one out")
    if layers:
        kind = _with_memory_layers(kind, layers, verify)
    theirs = None
    if found["model_type"] in CONFIG_MAPPING:  # with the defaults of Transformers
        theirs = CONFIG_MAPPING[found["model_type"]].from_dict(found)
        found = theirs.to_dict()
    elif verify:
        missing = f"Transformers has no model_type={found['model_type']!r} to compare with"
        raise ValueError(f"--verify-logits: {missing} (a package that registers it can be imported first)")
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
        if verify:
            verify_logits(checkpoint, folder, theirs, kind.names)
    return Path(output)


def _is_undone(quantised: dict) -> bool:
    """Whether a quantization_config is what loading leaves in the config of a model that it has unpacked. GGUF is
    never saved in a folder. Weights that are quantised all the same are refused one by one."""
    return quantised.get("quant_method") == "gguf" or quantised.get("dequantize") is True


def _with_memory_layers(kind: Source, layers: Sequence[int], verify: bool) -> Source:
    from .sources.llama import SOURCE, with_memory_layers

    if kind is not SOURCE:
        raise ValueError(f"layers={list(layers)} can be chosen with --from {SOURCE.name} only, not {kind.name}")
    if verify:
        raise ValueError("--verify-logits: a model whose attention layers became memory layers is not the source")
    return with_memory_layers(layers)


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


def _new_mixers(config: MCConfig, missing: list[str]) -> dict[str, torch.Tensor]:
    """The start of all weights of the mixers to which `missing` weights belong."""
    alone = {"num_hidden_layers": 1, "layer_types": [LAYER_TYPE], "intermediate_size": 0, "vocab_size": 1}
    small = MCConfig.from_dict(config.to_dict() | alone | dict.fromkeys(SPECIAL))
    found = {}
    for layer in sorted({name.split(".")[2] for name in missing if ".mixer." in name}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(layer))
            mixer = MCModel(small).layers[0].mixer
        found |= {f"model.layers.{layer}.mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    return found


def _check(name: str, target: str, part: torch.Tensor, wanted: dict, written: dict) -> None:
    if not part.is_floating_point() or part.itemsize < 2:
        raise ValueError(f"the weight {name!r} is quantised ({part.dtype}): save the source in fp32 or bf16 first")
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
