# Copyright 2026 the mc-transformers authors.
"""Run a study: many small trainings, one after the other, into one JSONL file.

    python -m benchmarks.measure.study mqar                                  # everything that has not run yet
    python -m benchmarks.measure.study mqar --cells linear --seeds 0 1 2     # a part of it
    python -m benchmarks.measure.study mqar --list                           # what has run, what has not

A run that is in the file already is not repeated, so an interrupted study goes on where it stopped, and several
processes may work on different cells of one study. A run that fails is recorded with its error.
The studies `mqar_512` and `language_30m` have larger settings and need a GPU.
`python -m benchmarks.report.page` makes tables and figures of the files.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.tasks.language import LanguageConfig, train_language
from benchmarks.tasks.needle import NeedleConfig, train_needle
from benchmarks.tasks.recall import RecallConfig, train_recall
from mc_transformers.modeling_mc.memories import MEMORIES


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


TASKS: dict[str, tuple[type, Callable[..., dict]]] = {
    "recall": (RecallConfig, train_recall),
    "needle": (NeedleConfig, train_needle),
    "language": (LanguageConfig, train_language),
}
# of the studies as they were run: a rule that joins the registry later is not missing
STUDIED = ("linear", "retention", "gated_linear", "swla", "gated_delta", "dla", "titans", "lstm", "gru")
LOGARITHMIC = {"aggregation": "grm", "options": '{"segmentation": "logarithmic"}'}


@dataclasses.dataclass
class Cell:
    """One row of a table: a name, a task and what it changes in the task's configuration, and its learning rates."""

    name: str
    task: str
    settings: dict
    rates: tuple[float, ...]
    seeds: int = 3

    def runs(self, seeds: list[int] | None) -> Iterator[dict]:
        """Settings of every run."""
        for seed in range(self.seeds) if seeds is None else seeds:
            for rate in self.rates:
                yield self.settings | {"lr": rate, "seed": seed}


def reads(memory: str) -> dict[str, dict]:
    """Every read rule that makes a difference for this memory; `soup` is `grm` unless a memory has two layers."""
    names = ("none", "residual", "grm", *(["soup"] if MEMORIES[memory].num_maps > 1 else []), "ssc")
    return {name: {"aggregation": name} for name in names} | {"log-linear++": LOGARITHMIC}


RECALL = {
    "seq_len": 128,
    "pairs": 32,
    "vocab": 128,
    "width": 16,
    "batch": 16,
    "steps": 2000,
    "eval_every": 250,
    "test_size": 256,
}


def mqar() -> list[Cell]:
    """Recall of 32 pairs from 128 tokens by two layers with one head of width 16."""
    cells = [
        Cell(f"linear {name}", "recall", RECALL | {"memory": "linear"} | read, (1e-2, 2e-2))
        for name, read in reads("linear").items()
    ]
    cells.append(Cell("attention", "recall", RECALL | {"layer_types": ["full_attention"]}, (1e-2, 2e-2)))
    for memory in STUDIED[1:]:
        vector = memory in ("lstm", "gru")  # they do not learn this task: `vectors` has one that they can
        for name, read in reads(memory).items():
            if vector and name not in ("none", "grm"):
                continue
            rates = (1e-2, 5e-3) if name in ("none", "grm", "ssc") and not vector else (1e-2,)
            settings = RECALL | {"memory": memory} | read
            cells.append(Cell(f"{memory} {name}", "recall", settings, rates, seeds=1 if vector else 3))
    return cells


def mqar_64() -> list[Cell]:
    """Recall of 16 pairs from 64 tokens in segments of 8: a state of the same size holds half as many pairs."""
    size = {"seq_len": 64, "pairs": 16, "segment_size": 8}
    rules = {f"linear {name}": read for name, read in reads("linear").items()}
    return [
        Cell(name, "recall", RECALL | size | read, (1e-2, 2e-2))
        for name, read in (rules | {"attention": {"layer_types": ["full_attention"]}}).items()
    ]


def mqar_256() -> list[Cell]:
    """Recall from 256 tokens: more and fewer pairs, wider and narrower models; other memories at one of the sizes."""
    cells = []
    main = ("linear none", "linear grm", "linear ssc", "attention")
    for pairs, width in ((64, 32), (32, 32), (16, 32), (64, 16), (64, 64), (32, 16), (16, 16), (32, 64), (16, 64)):
        size = {"seq_len": 256, "vocab": 256, "pairs": pairs, "width": width}
        rules = {f"linear {name}": read for name, read in reads("linear").items()}
        for name, read in (rules | {"attention": {"layer_types": ["full_attention"]}}).items():
            rates = (1e-2, 2e-2) if (pairs, width) == (64, 32) and name in main else (1e-2,)
            seeds = 3 if pairs == 64 or width == 32 else 1
            cells.append(Cell(f"{name}, {pairs} pairs, width {width}", "recall", RECALL | size | read, rates, seeds))
    size = {"seq_len": 256, "vocab": 256, "pairs": 64, "width": 32}
    for memory in ("swla", "gated_delta", "titans", "dla"):
        for name, read in reads(memory).items():
            settings = RECALL | size | {"memory": memory} | read
            cells.append(Cell(f"{memory} {name}, 64 pairs, width 32", "recall", settings, (1e-2,), seeds=1))
    return cells


def bursts() -> list[Cell]:
    """Recall of 32 pairs that come in 6 bursts of uneven lengths, between silences: borders every 16 tokens against
    borders that content chooses, with a rate loss that works for as many states."""
    size = {"seq_len": 256, "bursts": 6, "silence": 64, "random_non_queries": False, "steps": 1500}
    chosen = {"segmentation": "content", "least_segment_size": 4, "mean_segment_size": 16, "border_loss_weight": 0.3}
    rules = {"dissimilarity": {}, "budget": {"border_rule": "budget", "border_budget": 6.0}}
    borders = {"constant": {"segment_size": 16}} | {
        name: {"segment_size": 48, "options": json.dumps(chosen | rule)} for name, rule in rules.items()
    }
    cells = [Cell("none", "recall", RECALL | size | {"aggregation": "none"}, (1e-2,))]
    for read in ("grm", "ssc"):
        for name, fields in borders.items():
            cells.append(Cell(f"{read}, {name}", "recall", RECALL | size | {"aggregation": read} | fields, (1e-2,)))
    return cells


def vectors() -> list[Cell]:
    """Recall that LSTM and GRU can learn: few pairs, few ids, nothing in between."""
    easy = RECALL | {"seq_len": 64, "vocab": 32, "width": 64, "batch": 32, "random_non_queries": False}
    rules = {name: reads("gru")[name] for name in ("none", "residual", "grm", "ssc")}
    added = {"options": '{"vector_read": "add"}'}  # without caching it is the plain output of the cell
    rules |= {f"{name}, added": {"aggregation": name} | added for name in ("none", "grm")}
    return [
        Cell(f"{memory} {name}, {pairs} pairs", "recall", easy | {"memory": memory, "pairs": pairs} | read, (5e-3,))
        for memory, pairs in (("gru", 4), ("lstm", 2))
        for name, read in rules.items()
    ]


def cells() -> list[Cell]:
    """LSTM and GRU with caching whose answers are added and start at nothing: text, and the recall of `vectors`."""
    added = {"vector_read": "add", "state_init": "checkpoint"}
    closed = added | {"cached_answers": "added"}
    rules = {
        "none": ("none", added),
        "residual": ("residual", closed),
        "grm": ("grm", closed),
        "ssc": ("ssc", closed),
        "ssc, weighed": ("ssc", closed | {"vector_read": "add_weighted"}),
    }
    text = {"memory": "lstm", "train_length": 1024, "batch": 4, "segment_size": 128}
    easy = RECALL | {"seq_len": 64, "vocab": 32, "width": 64, "batch": 32, "random_non_queries": False}
    found = []
    for name, (rule, options) in rules.items():
        read = {"aggregation": rule, "options": json.dumps(options)}
        found.append(Cell(f"language: lstm {name}", "language", text | read, (4e-3,)))
        for memory, pairs in (("gru", 4), ("lstm", 2)):
            settings = easy | {"memory": memory, "pairs": pairs} | read
            found.append(Cell(f"recall: {memory} {name}", "recall", settings, (5e-3,)))
    return found


def ablations() -> list[Cell]:
    """One thing changed at a time in the GRM and SSC of a linear memory, on the task of `mqar`."""
    changes = {
        "as it is": {},
        "u is q": {"options": {"gate_source": "query"}},
        "sigmoid gates": {"options": {"gate_function": "sigmoid"}},
        "summary of hidden states": {"options": {"segment_summary": "hidden"}},
        "gate without segment context": {"options": {"segment_summary": "position"}},
        "4 summaries per segment": {"options": {"summaries_per_segment": 4}},
        "checkpoint": {"state_init": "checkpoint"},
        "segments of 8": {"segment_size": 8},
        "segments of 32": {"segment_size": 32},
    }
    only_ssc = {"k = 1": {"k": 1}, "k = 4": {"k": 4}, "one route": {"options": {"route_sharing": "model"}}}
    cells = []
    for read, own in (("grm", {}), ("ssc", only_ssc)):
        for name, change in (changes | own).items():
            change = {key: json.dumps(value) if key == "options" else value for key, value in change.items()}
            cells.append(Cell(f"{read}, {name}", "recall", RECALL | {"aggregation": read} | change, (1e-2,)))
    return cells


def needle() -> list[Cell]:
    """S-NIAH 1 to 3 in small form, trained at 128 tokens, read up to 1024; number 2 with a deep memory, too."""
    cells = []
    for kind in (2, 1, 3):
        for name in ("none", "grm", "ssc"):
            also = {"also": ["mean"]} if name == "none" else {}
            cells.append(Cell(f"{name}, {kind}", "needle", {"kind": kind, "aggregation": name} | also, (1e-2,)))
        attention = {"kind": kind, "layer_types": ["full_attention"]}
        cells.append(Cell(f"attention, {kind}", "needle", attention, (1e-2, 3e-3)))
    for name in ("none", "grm", "soup", "ssc"):
        deep = {"kind": 2, "memory": "dla", "aggregation": name}
        cells.append(Cell(f"dla {name}, 2", "needle", deep, (1e-2,), seeds=1))
    return cells


def language() -> list[Cell]:
    """Byte-level models of source code with about as many parameters each: the MLP makes up for what is missing."""
    means = ["mean", "mean/checkpoint"]
    plain, hybrid = {"mlp_width": 149}, {"layer_types": ["sliding_attention", "memory_caching"], "mlp_width": 152}
    settings = {
        "none": {"aggregation": "none", "also": means} | plain,
        "none, linear memory": {"memory": "linear", "aggregation": "none", "also": means} | plain,
        "none, gated delta": {"memory": "gated_delta", "aggregation": "none", "also": means} | plain,
        "residual": {"aggregation": "residual"} | plain,
        "grm": {"aggregation": "grm"},
        "ssc": {"aggregation": "ssc"},
        "log-linear++": LOGARITHMIC,
        "attention": {"layer_types": ["full_attention"], "mlp_width": 175},
        "window attention + grm": hybrid | {"options": '{"sliding_window": 64}'},
    }
    return [Cell(name, "language", change, (4e-3,)) for name, change in settings.items()]


def language_1024() -> list[Cell]:
    """The same models, trained on sequences of 1024 bytes and segments of 128: eight segments instead of four. Also
    with a memory without decay, which without caching reads what is far back as loudly as what is near."""
    longer = {"train_length": 1024, "batch": 4, "segment_size": 128}
    names = ("none", "residual", "grm", "ssc", "log-linear++", "none, linear memory")
    settings = {cell.name: cell.settings for cell in language() if cell.name in names}
    # the online memory is then that of `none`
    settings["grm from the last state"] = {"aggregation": "grm", "state_init": "checkpoint"}
    settings |= {f"{name}, linear memory": {"memory": "linear", "aggregation": name} for name in ("grm", "ssc")}
    return [Cell(name, "language", change | longer, (4e-3,)) for name, change in settings.items()]


def language_8m() -> list[Cell]:
    """Some of these trained for four times as many bytes, 8 million; and the read that starts from the plain model,
    beside its control (see `anchored`)."""
    names = ("none", "grm", "ssc", "grm from the last state")
    cells = [cell for cell in language_1024() if cell.name in names]
    cells += [cell for cell in anchored() if cell.name in ("language: closed", "language: running, bias 4")]
    names = [cell.name.removeprefix("language: ") for cell in cells]
    return [Cell(name, x.task, x.settings | {"steps": 2000}, x.rates) for name, x in zip(names, cells, strict=True)]


def anchored() -> list[Cell]:
    """Reads that start from the plain model, and dense training that is read sparsely: recall, needles, language.

    The control of the language cells is "closed": its gates hardly leave the online memory, so it computes what `none`
    does, and starts from the same random numbers as the others."""

    def fields(**options) -> dict:
        return {"options": json.dumps(options)}

    running = {"online_memory": "running"}
    size = RECALL | {"seq_len": 256, "vocab": 256, "pairs": 64, "width": 32, "read_as": [1, 2, 4, 8]}
    reads = {
        "grm": {},
        "running, bias 2": fields(**running, online_gate_bias=2.0),
        "running, added": fields(**running, cached_answers="added", cached_answers_start=1.0),
    }
    cells = [
        Cell(f"recall: {name}", "recall", size | {"aggregation": "grm"} | x, (1e-2,)) for name, x in reads.items()
    ]
    sparse = size | {"aggregation": "ssc", "k": 2, "dense_part": 0.5} | reads["running, bias 2"]
    cells.append(Cell("recall: running, bias 2, k from all to 2", "recall", sparse, (1e-2,)))
    for kind in (1, 2):
        for name, read in reads.items():
            settings = {"kind": kind, "aggregation": "grm"} | read
            cells.append(Cell(f"needle {kind}: {name}", "needle", settings, (1e-2,)))
    longer = {"train_length": 1024, "batch": 4, "segment_size": 128, "aggregation": "grm"}
    reads = {
        "closed": fields(**running, online_gate_bias=30.0),
        "grm": {},
        "running": fields(**running),
        "running, bias 4": fields(**running, online_gate_bias=4.0),
        "running, added": fields(**running, cached_answers="added"),
    }
    return cells + [Cell(f"language: {name}", "language", longer | x, (4e-3,)) for name, x in reads.items()]


def annealed() -> list[Cell]:
    """Recall and needles with a recipe that ends: two to three times the steps, a rate that falls to nothing, and
    haystacks of lines that end anywhere in their line."""
    long = {"schedule": "cosine", "steps": 4000, "eval_every": 500}
    running = {"options": json.dumps({"online_memory": "running", "online_gate_bias": 2.0})}
    recall = RECALL | {"seq_len": 256, "vocab": 256, "pairs": 64, "width": 32, "read_as": [1, 2, 4, 8]} | long
    sparse = recall | {"aggregation": "ssc", "k": 2, "dense_part": 0.5}
    cells = [Cell("recall: grm", "recall", recall | {"aggregation": "grm"}, (1e-2,))]
    cells.append(Cell("recall: grm, k from all to 2", "recall", sparse, (1e-2,)))
    rules = {"none": {"aggregation": "none"}, "grm": {"aggregation": "grm"}, "ssc": {"aggregation": "ssc"}}
    rules["grm, running, bias 2"] = {"aggregation": "grm"} | running
    for kind in (1, 2):
        for name, read in rules.items():
            settings = {"kind": kind, "any_phase": True, "schedule": "cosine", "steps": 1500, "eval_every": 500} | read
            cells.append(Cell(f"needle {kind}: {name}", "needle", settings, (1e-2,)))
    return cells


def quotes() -> list[Cell]:
    """Text whose second half repeats the first, its pieces in another order: the far past tells what comes."""
    running = {"online_memory": "running"}
    reads = {
        "closed": running | {"online_gate_bias": 30.0},
        "grm": {},
        "running, bias 4": running | {"online_gate_bias": 4.0},
        "running, added": running | {"cached_answers": "added"},
    }
    longer = {"train_length": 1024, "batch": 4, "segment_size": 128, "aggregation": "grm", "quotes": 128}
    longer |= {"steps": 1000, "eval_length": 2048}
    return [
        Cell(f"language: {name}", "language", longer | {"options": json.dumps(read)}, (4e-3,))
        for name, read in reads.items()
    ]


def mqar_512() -> list[Cell]:
    """The largest published setting of the task (arXiv 2312.04927): 64 pairs in 512 tokens, width 64. For a GPU."""
    size = {
        "seq_len": 512,
        "pairs": 64,
        "vocab": 8192,
        "width": 64,
        "segment_size": 32,
        "batch": 128,
        "steps": 10_000,
        "eval_every": 1000,
        "test_size": 3000,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "device": "cuda",
    }
    cells = [
        Cell(f"{memory} {name}", "recall", size | {"memory": memory} | read, (2.2e-3, 1e-2), seeds=5)
        for memory in ("linear", "swla", "gated_delta", "dla", "titans")
        for name, read in reads(memory).items()
    ]
    attention = size | {"layer_types": ["full_attention"]}
    return [*cells, Cell("attention", "recall", attention, (2.2e-3, 1e-2), seeds=5)]


def language_30m() -> list[Cell]:
    """The models of `language` with about 30M parameters, on sequences of 2048 bytes. For a GPU."""
    larger = {
        "layers": 10,
        "width": 512,
        "heads": 8,
        "segment_size": 256,
        "train_length": 2048,
        "eval_length": 16384,
        "batch": 32,
        "steps": 3000,
        "init_std": 0.02,
        "device": "cuda",
    }
    cells = []
    for cell in language():
        settings = cell.settings | larger | {"mlp_width": 8 * cell.settings.get("mlp_width", 128)}
        if len(types := settings.get("layer_types", [])) > 1:
            settings |= {"layer_types": types * 5, "options": '{"sliding_window": 256}'}
        cells.append(Cell(cell.name, cell.task, settings, (1e-3,)))
    return cells


STUDIES: dict[str, Callable[[], list[Cell]]] = {
    study.__name__: study
    for study in (
        mqar,
        mqar_64,
        mqar_256,
        bursts,
        vectors,
        cells,
        ablations,
        needle,
        language,
        language_1024,
        language_8m,
        anchored,
        annealed,
        quotes,
        mqar_512,
        language_30m,
    )
}


# ------------------------------------------------------------------------------------------------------ running
def commit() -> str:
    """Of the code that runs; "+changes" if a file that matters differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = ("kernels", "modeling_mc", "configuration_mc.py", "benchmarks/tasks")
    return head + "+changes" * subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode


def key(cell: str, settings: dict) -> str:
    return json.dumps([cell, settings], sort_keys=True)


def finished(path: Path) -> set[str]:
    """Keys of the runs in a file; a last line that was cut off by an interruption does not count."""
    keys = set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        keys.add(key(record["cell"], record["settings"]))
    return keys


def append(path: Path, record: dict) -> None:
    """One line in one write, so that processes that share a file do not mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    line = ("\n" if cut_off else "") + json.dumps(record) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())


def machine(settings: dict) -> str:
    """What a run of these settings runs on."""
    if settings.get("device", "cpu") != "cpu":
        return f"GPU, {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def run(study: str, cell: Cell, settings: dict, code: str, progress: bool) -> dict:
    """Trains once; the record says what ran, where, and how it ended. `code` is the commit."""
    config_type, train = TASKS[cell.task]
    record = {
        "study": study,
        "cell": cell.name,
        "task": cell.task,
        "settings": settings,
        "commit": code,
        "command": f"python -m benchmarks.measure.study {study} --cells '{cell.name}' --seeds {settings['seed']}",
        "machine": machine(settings),
    }
    try:
        return record | train(config_type(**settings), progress=progress)
    except (RuntimeError, ValueError) as error:
        return record | {"error": f"{type(error).__name__}: {error}"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--cells", nargs="+", default=[""], help="only cells whose name has one of these parts")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of those of the study")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/STUDY.jsonl")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    path = options.output or RESULTS / f"{options.study}.jsonl"
    cells = [cell for cell in STUDIES[options.study]() if any(part in cell.name for part in options.cells)]
    # seed by seed: a study that is interrupted has the first seed of every cell
    plan = [(cell, settings) for cell in cells for settings in cell.runs(options.seeds)]
    plan.sort(key=lambda pair: pair[1]["seed"])
    done = finished(path)
    todo = [(cell, settings) for cell, settings in plan if key(cell.name, settings) not in done]
    print(f"{options.study}: {len(plan) - len(todo)} of {len(plan)} runs are in {path}")
    if options.list:
        for cell, settings in todo:
            print(f"missing: {cell.name}, seed {settings['seed']}, lr {settings['lr']}")
        return
    if not torch.cuda.is_available() and any("cuda" in settings.get("device", "") for _, settings in todo):
        sys.exit(f"the study {options.study!r} needs a GPU, and torch finds none")
    code = commit()  # now: files may change while this runs, the code that was imported does not
    end = time.monotonic() + 60 * options.minutes
    for cell, settings in (bar := tqdm(todo)):
        if time.monotonic() > end:
            break
        bar.set_description(f"{cell.name}, seed {settings['seed']}")
        append(path, run(options.study, cell, settings, code, progress=sys.stderr.isatty()))


if __name__ == "__main__":
    main()
