"""The Triton kernels compile for GPUs that are not there, spill no register and fit into shared memory.

benchmarks/results/compile_table.json holds what they needed; it must cover what the ops launch now.
"""

import json
import warnings
from pathlib import Path

import pytest


pytest.importorskip("triton")
import compile_table  # noqa: E402 (it imports triton)
import triton  # noqa: E402


TABLE = compile_table.load()
ROWS = {(row["case"], row["kernel"], row["target"]): row for row in TABLE["rows"]}
CASES = dict(compile_table.cases())
PRESETS = {f"{op} {preset} bf16" for op in compile_table.OPS for preset in compile_table.WIDTHS}
ADVICE = "run `python benchmarks/compile_table.py --only {}`, look at what changed and commit the table"
COMPLETE = "sm_90"  # the target of which no case may be missing; `--missing` adds what other targets lack
# some of those that need the most, of every op and every preset width
COMPILED = [
    *((f"linear_write {preset} bf16", "_unit_kernel 2", "sm_90") for preset in ("mc-170m", "mc-760m")),
    ("segment_read mc-340m bf16", "_read_backward_kernel 1", "sm_90"),
    ("segment_read mc-1.3b bf16", "_gates_kernel 1", "sm_90"),
    ("selected_read d128 bf16", "_tile_kernel 2", "sm_90"),
    ("decode_step mc-1.3b bf16", "_token_kernel 1", "sm_90"),
]


@pytest.mark.parametrize("case, kernel, target", COMPILED)
def test_compiles_without_spilling(case, kernel, target):
    found = compile_table.record(CASES[case], target)[kernel].compile(target)
    assert found["shared"] <= compile_table.SHARED_LIMIT[target]
    if triton.__version__ != TABLE["triton"]:  # another compiler: registers may differ
        warnings.warn(f"the table is of Triton {TABLE['triton']}, here is {triton.__version__}", stacklevel=1)
        return
    known = ROWS[case, kernel, target]
    assert found["stack"] <= known["stack"], f"spills {found['stack']} bytes, before {known['stack']}"


@pytest.mark.parametrize("case", CASES)
def test_the_table_covers_what_is_launched(case):
    for target in compile_table.TARGETS:
        launched = {name: launch.meta for name, launch in compile_table.record(CASES[case], target).items()}
        known = {name: row["meta"] for (c, name, t), row in ROWS.items() if (c, t) == (case, target)}
        if known or target == COMPLETE:
            assert json.loads(json.dumps(launched)) == known, ADVICE.format(repr(case))


def test_the_table_is_clean():
    assert {row["case"] for row in TABLE["rows"]} == set(CASES)
    for key, row in ROWS.items():
        assert row["shared"] <= compile_table.SHARED_LIMIT[row["target"]], key
        assert row["stack"] == 0 or row["case"] not in PRESETS, key


def test_the_docs_show_the_table():
    page = Path(__file__).parents[1] / "docs" / "kernels.md"
    assert compile_table.markdown(TABLE) in page.read_text(), "python benchmarks/compile_table.py --markdown"
