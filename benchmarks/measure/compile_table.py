# Copyright 2026 the mc-transformers authors.
"""Compile every Triton kernel for GPUs that are not there, and write down what the compilers say.

    python -m benchmarks.measure.compile_table  # everything (about half an hour on one CPU core)
    python -m benchmarks.measure.compile_table --only segment_read  # the cases whose name starts so; the rest stays
    python -m benchmarks.measure.compile_table --missing  # what the table lacks, or what is launched otherwise now
    python -m benchmarks.measure.compile_table --markdown  # compile_table.md beside the table, from what is written

The launches are the ones that the ops make: the ops run on meta tensors, and `triton_common.recorder` catches each
kernel with its arguments. Registers and stack come from cuobjdump, tensor-core instructions from nvdisasm, both of the
Triton wheel; for AMD from the metadata in the assembly. STACK > 0 means registers were spilled: bytes per thread, for
AMD the number of registers. The result is written after every case and Triton keeps what it has compiled, so a run
that was stopped goes on where it was.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure.compile_cases import OPS, WIDTHS, cases
from mc_transformers.kernels.shared import triton as triton_common


TABLE = Path(__file__).parents[1] / "results" / "compile_table.json"
PAGE = TABLE.with_suffix(".md")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# what `chip` says there; sm_86 is as sm_89: the same tensor cores and shared memory
CHIPS = {"sm_89": "small", "sm_120": "small", "sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell"}
CHIPS["gfx942"] = "amd"
KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
SHARED_LIMIT = {target: 1024 * size for target, size in KIB.items()}  # bytes that one program may use
WIDE = ("d128 bf16", "mc-1.3b bf16")  # the cases of all targets; sm_90 has the others too
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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
        for parameter in self.kernel.params:
            name, value = parameter.name, self.args.get(parameter.name)
            known = not parameter.do_not_specialize  # the compiler may know that it is 1 or a multiple of 16
            if name in constants:
                signature[name] = "constexpr"
            elif value is None or (known and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
                if known and (isinstance(value, torch.Tensor) or value % 16 == 0):
                    aligned[(parameter.num,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned), options

    def compile(self, target: str) -> dict:
        """What one compilation needs: registers, bytes of stack and shared memory, tensor-core instructions."""
        source, options = self.source()
        compiled = triton.compile(source, target=TARGETS[target], options=options | triton_common.OPTIONS)
        used = {"shared": compiled.metadata.shared}
        if target.startswith("gfx"):
            text = compiled.asm["amdgcn"]
            numbers = {key: re.search(rf"\.{key}: +(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")}
            used["registers"], used["stack"] = (int(found.group(1)) if found else 0 for found in numbers.values())
            return used | {"mma": len(re.findall(r"\bv_s?mfma", text)), "wgmma": 0}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = (
                subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
                for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
            )
        used["registers"], used["stack"] = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        kinds = {"mma": r"\bHMMA\b", "wgmma": r"\b(?:HGMMA|UTC\w*MMA)\b"}
        return used | {kind: len(re.findall(pattern, code)) for kind, pattern in kinds.items()}


def compiled(case: str, target: str) -> bool:
    """Whether the table has a case on a target."""
    return target == "sm_90" or case.endswith(WIDE)


def record(run: Callable, target: str) -> dict[str, Launch]:
    """The launches that `run` makes on a chip, each once, as "kernel number" where one kernel is launched in several
    ways."""
    launches: list[Launch] = []
    triton_common.recorder = lambda *launch: launches.append(Launch(*launch))
    triton_common.target = CHIPS[target]
    try:
        run()
    finally:
        triton_common.recorder = triton_common.target = None
    named: dict[str, Launch] = {}
    seen: dict[str, list] = {}
    for launch in launches:
        name = launch.kernel.__name__
        kind = (sorted(launch.meta.items(), key=str), launch.source()[0].signature)
        if kind not in seen.setdefault(name, []):
            seen[name].append(kind)
            named[f"{name} {len(seen[name])}"] = launch
    return named


# -------------------------------------------------------------------------------------------------------- the table
def save(rows: list[dict], path: Path) -> None:
    """One line per kernel and target."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    partial.rename(path)


def current(rows: list[dict], launched: dict[str, Launch]) -> bool:
    """Whether the rows of a case and target are those of what is launched now."""
    known = {row["kernel"]: row["meta"] for row in rows}
    return known == json.loads(json.dumps({name: launch.meta for name, launch in launched.items()}))


def compile_all(only: str, targets: list[str], missing: bool, path: Path) -> None:
    """Compile the cases whose name starts with `only`, and replace their rows in the table of `path`."""
    known = load(path) if path.exists() else {"triton": triton.__version__, "rows": []}
    every = dict(cases())
    table: dict[tuple[str, str], list[dict]] = {}
    for row in known["rows"] if known["triton"] == triton.__version__ else []:
        table.setdefault((row["case"], row["target"]), []).append(row)
    chosen = [(name, t) for t in targets for name in every if name.startswith(only) and compiled(name, t)]
    work = {key: record(every[key[0]], key[1]) for key in chosen}
    work = {key: x for key, x in work.items() if not (missing and current(table.get(key, []), x))}
    with tqdm(total=sum(map(len, work.values()))) as progress:
        for (name, target), launched in work.items():
            found = []
            for kernel, launch in launched.items():
                progress.set_postfix_str(f"{name} {target} {kernel}")
                about = {"case": name, "kernel": kernel, "target": target}
                found.append(about | launch.compile(target) | {"meta": launch.meta})
                progress.update()
            table[name, target] = found
            save([row for name in every for target in TARGETS for row in table.get((name, target), [])], path)


def load(path: Path = TABLE) -> dict:
    """What was written: `triton` (version) and `rows` with case, kernel, target, registers, stack and shared (bytes),
    mma and wgmma (tensor-core instructions of
    a warp, and of four warps or of sm_100's tensor memory) and meta (compile-time constants)."""
    return json.loads(path.read_text())


def markdown(table: dict) -> str:
    """The page beside the table: the worst of all cases per target, and kernels of the preset widths on sm_90."""
    rows = table["rows"]
    lines = [
        "<!-- made by `python -m benchmarks.measure.compile_table --markdown` from compile_table.json -->",
        "# Kernels compiled for GPUs that were not there",
        "",
        f"Triton {table['triton']}; {len({(row['case'], row['kernel']) for row in rows})} kernels and shapes:",
        "",
        "| target | compiled | with spilled registers | most shared memory, KiB of | over it |",
        "|---|---|---|---|---|",
    ]
    for target, limit in SHARED_LIMIT.items():
        here = [row for row in rows if row["target"] == target]
        spilled = sum(row["stack"] > 0 for row in here)
        over = sum(row["shared"] > limit for row in here)
        most = max(row["shared"] for row in here) / 1024
        lines.append(f"| {target} | {len(here)} | {spilled} | {most:.0f} of {limit // 1024} | {over} |")
    lines += ["", "Registers on sm_90, bf16 (with spilled bytes after a +):", ""]
    lines.append(f"| kernel | {' | '.join(f'd = {width}' for width in WIDTHS.values())} |")
    lines.append("|---" * (len(WIDTHS) + 1) + "|")
    for op in OPS:
        here = {(row["kernel"], row["case"]): row for row in rows if row["target"] == "sm_90"}
        cases_of = [f"{op} {preset} bf16" for preset in WIDTHS]
        for kernel in dict.fromkeys(kernel for kernel, case in here if case in cases_of):
            found = [here.get((kernel, case)) for case in cases_of]
            cells = [f"{x['registers']}{'+' + str(x['stack']) if x['stack'] else ''}" if x else "" for x in found]
            lines.append(f"| `{op}` {kernel.strip('_').replace('_kernel', '')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name starts with this")
    parser.add_argument("--missing", action="store_true", help="only what the table lacks or what changed")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--output", type=Path, default=TABLE, help="rows of another Triton version are not kept there")
    parser.add_argument("--markdown", action="store_true", help="write the page and compile nothing")
    args = parser.parse_args()
    if args.markdown:
        partial = PAGE.with_suffix(".partial")
        partial.write_text(markdown(load()), encoding="utf-8")
        partial.replace(PAGE)
    else:
        compile_all(args.only, args.targets, args.missing, args.output)


if __name__ == "__main__":
    main()
