# Copyright 2026 the mc-transformers authors.
"""`mc_backend="auto"` on a GPU: the Triton kernels where they are right and faster on this very machine, else PyTorch.

A layer kind is looked at once (`trial.py`), in a process of its own, which may crash or hang, and the verdict is kept
in a file. While `torch.compile` traces or a CUDA graph is captured, verdicts are only looked up: call `warmup` before.
`MC_QUALIFY=0` leaves "auto" on PyTorch; `MC_CACHE` names the folder of the files (`~/.cache/mc_transformers`).
"""

import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..kernels.shared.ops import HAS_TRITON, NAMESPACE, unobserved


try:
    import fcntl
except ImportError:  # Windows: no lock, whoever is last writes
    fcntl = None

logger = logging.getLogger(NAMESPACE)

DEVICES = {"cuda"}  # kinds of devices on which kernels are tried
SECONDS = 120.0  # for the look at a layer kind
LONGEST_SEGMENT = 1024  # of the text that is tried: kernels are the same for all lengths
ENOUGH = 1.05  # how many times as fast as PyTorch
# by name, as it imports what imports this; a flat copy of the code (a Hub repository) has no such module, and no looks
TRIAL = f"{__name__.rpartition('.')[0]}.trial"
CAN_LOOK = HAS_TRITON and Path(__file__).with_name("trial.py").is_file()
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
TORCH, FUSED = "auto", "qualified"  # what ops are asked for
# fields that decide which kernels run, and how fast they are
FIELDS = (
    "memory",
    "aggregation",
    "segmentation",
    "state_init",
    "online_memory",
    "hidden_size",
    "head_dim",
    "key_head_dim",
    "value_head_dim",
    "num_selected_segments",
    "gate_source",
    "gate_function",
    "segment_summary",
    "summaries_per_segment",
    "memory_chunk_size",
    "memory_expansion",
    "memory_decay",
    "memory_head_norm",
    "gate_form",
)
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a process among others, which a look is not

_known: dict[tuple, str] = {}  # by kind, dtype, device, pass and deterministic mode


def kind_of(config, num_heads: int) -> str:
    """The fields of a layer of `num_heads` heads that a verdict is about, as JSON."""
    fields = {name: getattr(config, name) for name in FIELDS}
    size, unit = config.segment_size, math.lcm(config.memory_chunk_size, config.summaries_per_segment)
    while size > LONGEST_SEGMENT and size % 2 == 0 and (size // 2) % unit == 0:
        size //= 2
    return json.dumps(fields | {"num_attention_heads": num_heads, "segment_size": size}, sort_keys=True)


def auto_backend(memory: torch.nn.Module, kind: str, x: torch.Tensor) -> str:
    """What the ops of a memory are to be asked for, with activations like x, "qualified" (Triton, if there is one)
    or "auto" (PyTorch)."""
    if x.device.type not in DEVICES or not (CAN_LOOK and memory.has_triton) or x.dtype not in DTYPES:
        return TORCH
    training = torch.is_grad_enabled() and x.requires_grad
    name = "training" if training else "inference"
    if torch.compiler.is_compiling():
        return TORCH if torch.compiler.is_exporting() else _recall(kind, DTYPES[x.dtype], str(x.device), name)
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = _known.get((kind, DTYPES[x.dtype], str(x.device), name, deterministic))
    if found is None:
        if unobserved() or os.environ.get("MC_QUALIFY") == "0":
            return TORCH
        found = FUSED if qualify(kind, x.dtype, x.device, name)["fused"] else TORCH
    return found


@torch.compiler.assume_constant_result
def _recall(kind: str, dtype: str, device: str, name: str) -> str:
    """What is known, without a look; for `torch.compile`, which takes it as a constant."""
    return _known.get((kind, dtype, device, name, torch.are_deterministic_algorithms_enabled()), TORCH)


# ------------------------------------------------------------------------------------------------------------ verdicts
def qualify(
    kind: str, dtype: torch.dtype, device: torch.device, name: str, again: bool = False, seconds: float = SECONDS
) -> dict:
    """The verdict on a layer kind: read from its file, or found out, which takes up to `seconds`.

    Args:
        kind: of `kind_of`. dtype: of activations. name: "training" or "inference". again: look even where it is known.

    Returns:
        `fused` (bool), `why` (in words), `error` (largest RMS of the difference / RMS), `speedup` (by text; empty in
        deterministic mode, which takes no timing) and `file`.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = _key(kind, dtype, device, name)
    text = json.dumps(key, sort_keys=True)
    path = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    found = None if again else _read(path, key, deterministic)
    if found is None:
        with _alone(path, seconds) as (locked, writable):
            found = None if again else _read(path, key, deterministic)  # another process may have been faster
            if found is None and locked:
                found = _judge(_look(key, str(device), deterministic, seconds))
                kept = found.pop("kept")
                where = _write(path, {"key": key, "verdict": found}) if kept and writable else None
                about = f"{key['kind']['memory']} {key['kind']['aggregation']}, {name}, {key['dtype']}"
                place = where or "not kept, the next process looks again"
                logger.warning("mc_backend='auto': %s on %s: %s (%s)", about, key["chip"][0], found["why"], place)
            elif found is None:
                found = {
                    "fused": False,
                    "why": "torch: another process is still looking",
                    "error": None,
                    "speedup": {},
                }
    _known[kind, DTYPES[dtype], str(device), name, deterministic] = FUSED if found["fused"] else TORCH
    return found | {"file": str(path)}


def _judge(seen: dict) -> dict:
    """A verdict of what a look has seen; `kept`: whether it would be the same in another process."""
    error, speedup = seen.get("error"), seen.get("speedup", {})
    found = {"fused": False, "error": error, "speedup": speedup, "kept": seen["kept"]}
    if "problem" in seen:
        return found | {"why": f"torch: {seen['problem']}"}
    if not seen["right"]:
        return found | {"why": f"torch: Triton is wrong in `{seen['where']}`, by {error:.1e}"}
    mean = math.prod(speedup.values()) ** (1 / len(speedup)) if speedup else None
    if mean is None:
        return found | {"fused": True, "why": f"Triton, differs by {error:.1e}; not timed, deterministic"}
    choice = "Triton" if mean >= ENOUGH else "torch: Triton is right, but"
    why = f"{choice} {mean:.2f} times as fast as torch, differs by {error:.1e}"
    return found | {"fused": mean >= ENOUGH, "why": why}


def _key(kind: str, dtype: torch.dtype, device: torch.device, name: str) -> dict:
    """All that a verdict depends on."""
    import triton

    chip, driver = [device.type], None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        shared = getattr(about, "shared_memory_per_block_optin", None)
        chip = [about.name, about.major, about.minor, about.multi_processor_count, shared]
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    return {
        "kind": json.loads(kind),
        "pass": name,
        "dtype": DTYPES[dtype],
        "precision": torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else None,
        "source": _source(),
        "versions": [torch.__version__, triton.__version__, torch.version.cuda or torch.version.hip, driver],
        "chip": chip,
    }


def _source() -> str:
    """Hash of all kernels."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parents[1] / "kernels").rglob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:24]


def _folder() -> Path:
    return Path(os.environ.get("MC_CACHE") or Path.home() / ".cache" / "mc_transformers") / "qualified"


# --------------------------------------------------------------------------------------------------------------- files
def _read(path: Path, key: dict, deterministic: bool) -> dict | None:
    """A verdict that was kept; None if there is none, or one without the timing that is needed now."""
    try:
        found = json.loads(path.read_text())
        verdict = found["verdict"]
        if found["key"] != json.loads(json.dumps(key)) or not {"fused", "why", "error", "speedup"} <= verdict.keys():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    untimed = verdict["fused"] and not verdict["speedup"]
    return None if untimed and not deterministic else verdict


def _write(path: Path, found: dict) -> Path | None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
            file.write(json.dumps(found, indent=1) + "\n")
        os.replace(file.name, path)
        return path
    except OSError:
        return None


@contextmanager
def _alone(path: Path, seconds: float) -> Iterator[tuple[bool, bool]]:
    """No other process of this machine looks at the same. Gives whether that was possible within the time of a look,
    and whether the folder can be written; a lock ends with its process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")
    except OSError:
        yield True, False  # every process looks for itself
        return
    with lock:
        deadline, locked = time.monotonic() + seconds + 30, fcntl is None
        while not locked:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            except OSError:  # a file system without locks
                locked = True
        yield locked, True


# ------------------------------------------------------------------------------------------------- the other process
def _command() -> list[str]:
    path = [entry for entry in sys.path if entry] + [os.getcwd()]
    code = f"import sys; sys.path[:] = {path!r}; import importlib; importlib.import_module({TRIAL!r}).answer()"
    return [sys.executable, "-c", code]


def _look(key: dict, device: str, deterministic: bool, seconds: float, command: Callable[[], list[str]] = _command):
    """What a process of its own sees of both backends; what comes in its way is a `problem`."""
    request = {"key": key, "device": device, "timed": not deterministic}
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    try:
        done = subprocess.run(
            command(), input=json.dumps(request), env=environment, text=True, capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"Triton did not end within {seconds:.0f} s", "kept": True}
    except OSError as error:
        return {"problem": f"no process could be started ({error})", "kept": False}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines()
        return {"problem": f"the look ended with {done.returncode} ({lines[-1][:200] if lines else ''})", "kept": True}
