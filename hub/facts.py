# Copyright 2026 the mc-transformers authors.
"""What `mc-transformers env` and `mc-transformers info` print."""

import platform
import re
from collections.abc import Iterable
from importlib import metadata

import torch

from .. import MCCache, MCConfig, MCForCausalLM, __version__
from ..configuration_mc import LAYER_TYPE
from ..kernels.shared.ops import OPS, choose_backend
from ..kernels.write.delta import fla_rule
from ..modeling_mc.borders import Borders


PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "triton", "peft", "accelerate")
LENGTHS = {"4K": 4096, "128K": 131072, "1M": 1048576}
FIELDS = (
    "memory",
    "aggregation",
    "segmentation",
    "segment_size",
    "state_init",
    "num_selected_segments",
    "gate_source",
    "gate_function",
    "segment_summary",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "vocab_size",
)


def table(rows: Iterable[tuple], header: tuple | None = None) -> str:
    """Columns of text, the first one left-aligned; with a header also a line under it."""
    rows = [tuple(map(str, row)) for row in ([header] if header else []) + list(rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.ljust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if header:
        lines.insert(1, "─" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(line.rstrip() for line in lines)


def human_bytes(count: float) -> str:
    """`count` in binary units with three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


# ---------------------------------------------------------------------------------------------------------------- env
def versions() -> dict[str, str]:
    """Versions of this package, Python and what the package builds on; "not installed" where it is missing."""
    found = {"mc_transformers": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # names the build, which the wheel's metadata may not
    return {"python": f"{platform.python_version()} ({platform.platform()})", **found}


def devices() -> list[str]:
    """The accelerators that torch sees, else the processor."""
    if not torch.cuda.is_available():
        return [f"cpu, {torch.get_num_threads()} threads (torch sees no GPU)"]
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = human_bytes(properties.total_memory)
        names.append(f"cuda:{index} {properties.name}, {memory}, capability {properties.major}.{properties.minor}")
    return names


def backend_of(op: str, device: str) -> tuple[str, str]:
    """The backend that `mc_backend="auto"` takes for an op on a device, and why."""
    if op == "delta_write" and device == "cuda" and fla_rule() is not None:
        return "fla", "kernels of the package `fla` for half precision; torch for other dtypes"
    x, width = torch.empty(0, device=device), 64
    chosen = choose_backend("auto", op, x, width)
    if OPS[op] is None:
        return chosen, "it has no Triton kernels"
    try:
        choose_backend("triton", op, x, width)
    except ValueError as error:
        return chosen, re.sub(r".*is not possible for `\w+`: (.*); allowed here.*", r"\1", str(error))
    return chosen, "its Triton kernels: mc_backend='triton', or 'auto' on a GPU where they qualify"


def backends() -> list[tuple[str, str, str, str]]:
    """Op, kind of device, backend and why, for every registered op and what torch sees here."""
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [(op, kind, *backend_of(op, kind)) for op in sorted(OPS) for kind in kinds]


def environment() -> str:
    """The report of `mc-transformers env`."""
    rows = [*versions().items(), *(("device", name) for name in devices())]
    return f"{table(rows)}\n\n{table(backends(), ('op', 'device', 'backend', 'why'))}"


# --------------------------------------------------------------------------------------------------------------- info
def _dtype(config: MCConfig) -> torch.dtype:
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype  # `save_pretrained` leaves a name there


def skeleton(config: MCConfig) -> MCForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return MCForCausalLM(config).to(_dtype(config)).eval()


@torch.no_grad()
def cache_bytes(config: MCConfig, num_tokens: int, model: MCForCausalLM | None = None) -> int:
    """Bytes of the cache of one row of `num_tokens` tokens: the model itself fills it, on a device without memory."""
    model = model or skeleton(config)
    cache = MCCache(config=config)
    model(torch.zeros(1, num_tokens, dtype=torch.int64, device="meta"), cache=cache, logits_to_keep=1)
    return cache.nbytes


def key_value_bytes(config: MCConfig, num_tokens: int) -> int:
    """Bytes of the keys and values of a Transformer with as many layers of the same width, in the model's dtype."""
    width = config.num_attention_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * num_tokens * _dtype(config).itemsize


def segment_bytes(config: MCConfig, model: MCForCausalLM | None = None) -> int:
    """Bytes that one more finished segment adds to the cache, all memory layers together."""
    model, size = model or skeleton(config), Borders.of(config).least
    attention = sum(kind == "full_attention" for kind in config.layer_types)
    keys = 2 * attention * config.num_key_value_heads * config.head_dim * size
    grown = cache_bytes(config, 3 * size, model) - cache_bytes(config, 2 * size, model)
    return grown - keys * _dtype(config).itemsize


def architecture(config: MCConfig) -> dict[str, str]:
    """The fields of a config that say what kind of model it is."""
    rows = {name: str(getattr(config, name)) for name in FIELDS} | {"dtype": str(_dtype(config)).split(".")[-1]}
    kinds = {kind: config.layer_types.count(kind) for kind in dict.fromkeys(config.layer_types)}
    if set(kinds) != {LAYER_TYPE}:
        rows["layer_types"] = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if config.aggregation != "ssc":
        del rows["num_selected_segments"]
    for name in ("online_memory", "online_gate_bias", "cached_answers", "trained_as"):
        if getattr(config, name) != MCConfig.__dataclass_fields__[name].default:
            rows[name] = str(getattr(config, name))
    return rows


def lengths(config: MCConfig, model: MCForCausalLM | None = None) -> list[tuple[str, int, int]]:
    """Per context length its name, and the bytes of our cache and of keys and values."""
    model = model or skeleton(config)
    return [(name, cache_bytes(config, num, model), key_value_bytes(config, num)) for name, num in LENGTHS.items()]


def describe(config: MCConfig) -> str:
    """The report of `mc-transformers info`."""
    model = skeleton(config)
    rows = {"parameters": f"{model.num_parameters():,}", **architecture(config)}
    rows["bytes per segment"] = f"{segment_bytes(config, model):,} (all layers, one sequence)"
    sizes = [
        (name, human_bytes(ours), human_bytes(keys), f"{keys / ours:.1f} x")
        for name, ours, keys in lengths(config, model)
    ]
    header = ("tokens", "this model's cache", "keys and values of the same width", "ratio")
    return f"{table(rows.items())}\n\n{table(sizes, header)}"
