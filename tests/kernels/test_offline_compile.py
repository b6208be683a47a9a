"""The Triton kernels compile for GPUs that are not there, fit into shared memory and spill no more than is known.

benchmarks/results/compile_table.json holds what they needed; it must cover what the ops launch now, on all
targets, but for `deep_write`. By itself: `TRITON_INTERPRET=0 pytest tests/kernels/test_offline_compile.py`.
"""

import json
import warnings

import pytest


pytest.importorskip("triton")
import triton  # noqa: E402

from benchmarks.measure import compile_cases, compile_table
from mc_transformers.kernels.shared.ops import triton_interpreted
from mc_transformers.kernels.write import deep_triton


pytestmark = pytest.mark.skipif(triton_interpreted(), reason="runs in the process that test_backends starts")

TABLE = compile_table.load()
ROWS = {(row["case"], row["kernel"], row["target"]): row for row in TABLE["rows"]}
CASES = dict(compile_cases.cases())
ADVICE = "run `python -m benchmarks.measure.compile_table --only {}`, look at what changed and commit the table"
SPILLS: dict[str, dict[tuple[str, str], int]] = {  # bytes per thread; on gfx942 registers
    "sm_80": {
        ("selected_read mc-1.3b bf16", "_tile_kernel 2"): 8,
        ("deep_write dla d128 bf16", "_write_kernel 1"): 112,
        ("deep_write dla d128 bf16", "write_backward_kernel 1"): 1032,
        ("deep_write titans d128 bf16", "_write_kernel 1"): 240,
        ("deep_write titans d128 bf16", "_write_kernel 2"): 16,
        ("deep_write titans d128 bf16", "write_backward_kernel 1"): 2272,
        ("deep_read d128 bf16", "_read_backward_kernel 1"): 136,
        ("deep_read d128 bf16", "_maps_backward_kernel 1"): 32,
        ("deep_selected_read d128 bf16", "_maps_backward_kernel 1"): 72,
    },
    "sm_89": {
        ("selected_read mc-1.3b bf16", "_tile_kernel 2"): 16,
        ("deep_write dla d128 bf16", "_write_kernel 1"): 56,
        ("deep_write dla d128 bf16", "write_backward_kernel 1"): 776,
        ("deep_write titans d128 bf16", "_write_kernel 1"): 144,
        ("deep_write titans d128 bf16", "_write_kernel 2"): 24,
        ("deep_write titans d128 bf16", "write_backward_kernel 1"): 1784,
        ("deep_read d128 bf16", "_read_backward_kernel 1"): 24,
        ("deep_read d128 bf16", "_maps_backward_kernel 1"): 24,
        ("deep_selected_read d128 bf16", "_maps_backward_kernel 1"): 64,
    },
    "sm_90": {
        ("segment_read mc-760m bf16", "_summaries_backward_kernel 1"): 8,
        ("deep_write dla mc-170m bf16", "write_backward_kernel 1"): 664,
        ("deep_write dla mc-340m bf16", "write_backward_kernel 1"): 656,
        ("deep_write dla mc-760m bf16", "write_backward_kernel 1"): 904,
        ("deep_write dla d128 bf16", "write_backward_kernel 1"): 912,
        ("deep_write titans mc-170m bf16", "write_backward_kernel 1"): 1296,
        ("deep_write titans mc-340m bf16", "write_backward_kernel 1"): 1240,
        ("deep_write titans mc-760m bf16", "_write_kernel 1"): 80,
        ("deep_write titans mc-760m bf16", "write_backward_kernel 1"): 2000,
        ("deep_write titans d128 bf16", "_write_kernel 1"): 48,
        ("deep_write titans d128 bf16", "write_backward_kernel 1"): 1952,
        ("deep_read mc-760m bf16", "_read_backward_kernel 1"): 160,
        ("deep_read mc-760m bf16", "_summaries_backward_kernel 1"): 8,
        ("deep_read d128 bf16", "_read_backward_kernel 1"): 184,
    },
    "sm_100": {
        ("deep_write dla d128 bf16", "write_backward_kernel 1"): 872,
        ("deep_write titans d128 bf16", "_write_kernel 1"): 48,
        ("deep_write titans d128 bf16", "write_backward_kernel 1"): 1976,
        ("deep_read d128 bf16", "_read_backward_kernel 1"): 256,
    },
    "sm_120": {
        ("linear_write d128 bf16", "_unit_kernel 2"): 40,
        ("linear_write d128 bf16", "_unit_kernel 3"): 48,
        ("linear_write d128 bf16", "_unit_kernel 8"): 32,
        ("linear_write d128 bf16", "_unit_kernel 9"): 32,
        ("segment_read d128 bf16", "_read_kernel 1"): 40,
        ("segment_read mc-1.3b bf16", "_read_kernel 1"): 16,
        ("selected_read mc-1.3b bf16", "_tile_kernel 2"): 16,
        ("deep_write dla d128 bf16", "_write_kernel 1"): 80,
        ("deep_write dla d128 bf16", "write_backward_kernel 1"): 872,
        ("deep_write titans d128 bf16", "_write_kernel 1"): 152,
        ("deep_write titans d128 bf16", "_write_kernel 2"): 40,
        ("deep_write titans d128 bf16", "write_backward_kernel 1"): 2008,
        ("deep_read d128 bf16", "_read_backward_kernel 1"): 96,
        ("deep_read d128 bf16", "_maps_backward_kernel 1"): 96,
        ("deep_selected_read d128 bf16", "_maps_backward_kernel 1"): 72,
    },
    "gfx942": {
        ("deep_write dla d128 bf16", "_write_kernel 1"): 48,
        ("deep_write dla d128 bf16", "write_backward_kernel 1"): 262,
        ("deep_write titans d128 bf16", "_write_kernel 1"): 71,
        ("deep_write titans d128 bf16", "write_backward_kernel 1"): 428,
        ("deep_read d128 bf16", "_read_backward_kernel 1"): 49,
        ("deep_read d128 bf16", "_maps_backward_kernel 1"): 105,
        ("deep_selected_read d128 bf16", "_maps_backward_kernel 1"): 101,
    },
}
# what makes one kernel several, whatever the lengths
FLAGS = ("BEGIN", "END", "WRITE", "FLOW", "REVERSE", "TRANSPOSED", "PRODUCTS", "DX", "NM", "K")
# some of those that need the most, of every op and every preset width
COMPILED = [
    *((f"linear_write {preset} bf16", "_unit_kernel 2", "sm_90") for preset in ("mc-170m", "mc-760m")),
    ("segment_read d128 bf16", "_read_kernel 1", "sm_90"),
    ("segment_read mc-340m bf16", "_read_backward_kernel 1", "sm_90"),
    ("segment_read mc-1.3b bf16", "_gates_kernel 1", "sm_90"),
    ("selected_read d128 bf16", "_tile_kernel 2", "sm_90"),
    ("decode_step mc-1.3b bf16", "_token_kernel 1", "sm_90"),
    ("state_step mc-340m bf16", "_state_kernel 3", "sm_90"),
    ("slot_write d64 bf16", "_slot_kernel 1", "sm_90"),
    ("deep_write titans mc-340m bf16", "_write_kernel 1", "sm_90"),
    ("deep_read d128 bf16", "_read_kernel 1", "gfx942"),
    ("segment_read mc-1.3b bf16", "_read_kernel 1", "sm_89"),
    ("deep_selected_read d128 bf16", "_tile_kernel 1", "sm_80"),
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
        if not compile_table.compiled(case, target):
            continue
        launched = {name: launch.meta for name, launch in compile_table.record(CASES[case], target).items()}
        known = {name: row["meta"] for (c, name, t), row in ROWS.items() if (c, t) == (case, target)}
        assert json.loads(json.dumps(launched)) == known, ADVICE.format(repr(case))


def test_everything_fits_into_shared_memory():
    assert {row["case"] for row in TABLE["rows"]} == set(CASES)
    for key, row in ROWS.items():
        assert row["shared"] <= compile_table.SHARED_LIMIT[row["target"]], key


@pytest.mark.parametrize("target", compile_table.TARGETS)
def test_what_spills_at_the_widths_of_presets_is_known(target):
    found = {
        (case, kernel): row["stack"]
        for (case, kernel, t), row in ROWS.items()
        if t == target and case in compile_cases.PRESETS and row["stack"]
    }
    assert found == SPILLS.get(target, {})


def test_the_page_shows_the_table():
    page = compile_table.PAGE.read_text(encoding="utf-8")
    assert page == compile_table.markdown(TABLE), "python -m benchmarks.measure.compile_table --markdown"


@pytest.mark.parametrize("op", ["linear_write", "segment_read", "segment_route", "selected_read", "deep_read"])
def test_no_kernel_is_compiled_for_a_length(op, monkeypatch):
    """Prompts below a segment, or of two: three variants at most (one slot, whole sixteens, others)."""
    variants = {}
    for width in (1, 5, 16, 17, 40, 64, 100):
        for segments, cached in ((1, 1), (2, 16)):
            for name, value in {"WIDTH": width, "SEGMENTS": segments, "CACHED": cached}.items():
                monkeypatch.setattr(compile_cases, name, value)
            for launch in compile_table.record(CASES[f"{op} mc-340m bf16"], "sm_90").values():
                source, _ = launch.source()
                kind = (sorted(launch.meta.items()), sorted(source.signature.items()), sorted(source.attrs))
                flags = [(key, launch.meta[key]) for key in FLAGS if key in launch.meta]
                variants.setdefault((launch.kernel.__name__, str(flags)), set()).add(str(kind))
    assert max(map(len, variants.values())) <= 3, {key: len(kinds) for key, kinds in variants.items()}


def test_the_stacks_of_a_deep_write_are_bounded(monkeypatch):
    """In the forward of a long text, too."""
    monkeypatch.setattr(compile_cases, "SEGMENTS", 256)
    launches = compile_table.record(CASES["deep_write titans d128 bf16"], "sm_90")
    assert max(launch.args["stack2"].numel() for launch in launches.values()) <= deep_triton.STACKS
