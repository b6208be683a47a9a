# Copyright 2026 the mc-transformers authors.
"""Compile every Triton kernel for GPUs that are not there, and write down what the compilers say.

    python benchmarks/compile_table.py          # rewrites compile_table.json (minutes)

The launches are the ones that the ops make: the ops run on meta tensors, and `triton_common.recorder` catches each
kernel with its arguments. Registers and stack come from cuobjdump, tensor-core instructions from nvdisasm, both of the
Triton wheel; for AMD from the metadata in the assembly. STACK > 0 means registers were spilled.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mc_transformers.kernels import triton_common, triton_linear_write, triton_segment_read


TABLE = Path(__file__).with_name("compile_table.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CHIPS = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "hopper", "gfx942": "amd"}
# bytes of shared memory that one program may use
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
WIDTHS = {"mc-170m": 48, "mc-340m": 64, "mc-760m": 96, "d128": 128, "mc-1.3b": 256}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


@dataclass
class Launch:
    """A kernel, its arguments (tensors, integers, None) and its compile-time constants with num_warps, num_stages."""

    kernel: Callable
    args: dict
    meta: dict

    def source(self) -> tuple[ASTSource, dict]:
        options = {key: self.meta[key] for key in ("num_warps", "num_stages")}
        constants = {key: value for key, value in self.meta.items() if key not in options}
        signature, aligned = {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.args.get(name)
            if name in constants:
                signature[name] = "constexpr"
            elif value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
                if isinstance(value, torch.Tensor) or value % 16 == 0:
                    aligned[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned), options

    def compile(self, target: str) -> dict:
        """What one compilation needs: registers, bytes of stack and shared memory, tensor-core instructions."""
        source, options = self.source()
        compiled = triton.compile(source, target=TARGETS[target], options=options)
        used = {"shared": compiled.metadata.shared}
        if target.startswith("gfx"):
            text = compiled.asm["amdgcn"]
            numbers = {key: re.search(rf"\.{key}: +(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")}
            used["registers"], used["stack"] = (int(found.group(1)) if found else 0 for found in numbers.values())
            return used | {"tensor_core": len(re.findall(r"\bv_s?mfma", text))}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = (
                subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
                for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
            )
        used["registers"], used["stack"] = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        return used | {"tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code))}


def record(run: Callable, target: str) -> list[Launch]:
    """The launches that `run` makes on a chip, each once."""
    launches: list[Launch] = []
    triton_common.recorder = lambda *launch: launches.append(Launch(*launch))
    triton_common.target = CHIPS[target]
    try:
        run()
    finally:
        triton_common.recorder = triton_common.target = None
    kinds = {(x.kernel.__name__, str(sorted(x.meta.items())), str(x.source()[0].signature)): x for x in launches}
    return list(kinds.values())


# ------------------------------------------------------------------------------------------------------ what is run
ROWS, SEGMENTS, WIDTH, HEADS, CACHED = 2, 16, 256, 16, 16


def grid(*width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(ROWS, SEGMENTS, WIDTH, HEADS, *width, dtype=dtype, device="meta")


def linear_write(width: int, dtype: torch.dtype, decay: bool = True, carry: bool = False) -> None:
    q, k, v, go = (grid(width, dtype=dtype) for _ in range(4))
    log_decay = grid(dtype=torch.float32) if decay else None
    states = torch.empty(ROWS, SEGMENTS, HEADS, width, width, device="meta")
    initial = states[:, 0] if carry else None
    triton_linear_write.forward(q, k, v, log_decay, initial, None, carry)
    triton_linear_write.backward(go, states, q, k, v, log_decay, initial, None, carry)


def segment_read(width: int, dtype: torch.dtype, blocks: int = 1, function: str = "softmax") -> None:
    q, u, out = (grid(width, dtype=dtype) for _ in range(3))
    memories = CACHED + SEGMENTS
    states = torch.empty(ROWS, memories, HEADS, width, width, device="meta")
    summaries = torch.empty(ROWS, memories, HEADS, blocks, width, device="meta")
    logit, birth, first = (
        grid(dtype=torch.float32),
        torch.empty(ROWS, memories, dtype=torch.int64, device="meta"),
        torch.empty(ROWS, SEGMENTS, dtype=torch.int64, device="meta"),
    )
    inputs = (q, u, states, summaries, logit, birth, first, function)
    triton_segment_read.forward(*inputs)
    triton_segment_read.backward(out, logit, out, logit, *inputs)


def cases() -> Iterator[tuple[str, Callable]]:
    """Names and runs: the preset widths in bf16, and the other dtypes and flags at one width."""
    for name, width in WIDTHS.items():
        yield f"linear_write {name} bf16", lambda width=width: linear_write(width, torch.bfloat16)
        yield f"segment_read {name} bf16", lambda width=width: segment_read(width, torch.bfloat16)
    yield "segment_read d64 sub-blocks bf16", lambda: segment_read(64, torch.bfloat16, 4)
    yield "segment_read d64 sigmoid bf16", lambda: segment_read(64, torch.bfloat16, function="sigmoid")
    yield "segment_read d64 fp16", lambda: segment_read(64, torch.float16)
    yield "segment_read d64 fp32", lambda: segment_read(64, torch.float32)
    yield "linear_write d64 no-decay bf16", lambda: linear_write(64, torch.bfloat16, decay=False)
    yield "linear_write d64 carry bf16", lambda: linear_write(64, torch.bfloat16, carry=True)
    yield "linear_write d64 fp16", lambda: linear_write(64, torch.float16)
    yield "linear_write d64 fp32", lambda: linear_write(64, torch.float32)


def table(only: str = "", targets: tuple[str, ...] = tuple(TARGETS)) -> dict[str, dict]:
    """Compile the cases whose name starts with `only`: {"case / kernel number": {target: numbers}}."""
    chosen = [(name, run) for name, run in cases() if name.startswith(only)]
    rows: dict[str, dict] = {}
    for name, run in tqdm(chosen, disable=len(chosen) < 2):
        for target in targets:
            for number, launch in enumerate(record(run, target)):
                row = rows.setdefault(f"{name} / {launch.kernel.__name__} {number}", {})
                row[target] = launch.compile(target) | {"meta": launch.meta}
    return rows


def main() -> None:
    result = {"triton": triton.__version__, "kernels": table()}
    partial = TABLE.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(TABLE)


if __name__ == "__main__":
    main()
