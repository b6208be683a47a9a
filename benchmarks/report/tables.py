# Copyright 2026 the mc-transformers authors.
"""The tables and figures of docs/results.md, by the name that stands in the page's markers."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.report.figures import Figure, curves, heat, most_pairs, scatter


RESULTS = Path(__file__).resolve().parents[1] / "results"
LEARNED = 0.1  # accuracy of recall above which a run has begun to learn, where guessing gives less


# ------------------------------------------------------------------------------------------------------ the files
def read_runs(study: str) -> list[dict]:
    """The runs of a study; a line that an interruption cut off is left out."""
    path, runs = RESULTS / f"{study}.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return runs


def by_cell(runs: Iterable[dict]) -> dict[str, list[dict]]:
    cells: dict[str, list[dict]] = {}
    for run in runs:
        cells.setdefault(run["cell"], []).append(run)
    return cells


def by_memory(cells: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The cells of one memory, the first word of their names, side by side."""
    memories = list(dict.fromkeys(name.split()[0] for name in cells))
    return dict(sorted(cells.items(), key=lambda pair: memories.index(pair[0].split()[0])))


def best_rate(runs: list[dict], value: Callable[[dict], float]) -> list[dict]:
    """The runs of the learning rate with the best mean: the published rule. Failed runs are left out."""
    rates: dict[float, list[dict]] = {}
    for run in runs:
        if "error" not in run:
            rates.setdefault(run["settings"]["lr"], []).append(run)
    return max(rates.values(), key=lambda group: statistics.mean(map(value, group)), default=[])


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds, or the one value."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def wide(values: list[float]) -> bool:
    """Whether mean and deviation hide that some runs learned and others did not."""
    return len(values) > 1 and statistics.stdev(values) > 0.1


def origin(study: str, runs: list[dict]) -> str:
    """Command, commits, machine, seeds and failures of a table."""
    failed = sum("error" in run for run in runs)
    seeds = sorted({run["settings"]["seed"] for run in runs})
    versions = {f"torch {r['versions']['torch']}, Python {r['versions']['python']}" for r in runs if "versions" in r}
    return (
        f"`python -m benchmarks.measure.study {study}` · commits {listed(run['commit'] for run in runs)} · "
        f"{listed(run['machine'] for run in runs)} · {listed(versions)} · seeds {', '.join(map(str, seeds))} · "
        f"{len(runs)} runs, {failed} failed"
    )


def listed(words: Iterable[str]) -> str:
    return "; ".join(sorted(set(words)))


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_seed(runs: list[dict], value: Callable[[dict], float]) -> dict[int, float]:
    return {run["settings"]["seed"]: value(run) for run in runs}


def against(plain: dict[int, float] | None, values: dict[int, float]) -> str:
    """Mean difference to the same memory without caching, over the seeds that both have; nothing if there are none."""
    common = sorted((plain or {}).keys() & values.keys())
    if not common or plain is values:
        return ""
    few = f" [{len(common)}]" if len(common) < len(values) else ""
    return f"{statistics.mean(values[seed] - plain[seed] for seed in common):+.3f}{few}"


# ------------------------------------------------------------------------------------------------------ the tables
def recall(study: str, chart: Callable | None = None, learning: bool = True) -> list[str | Figure]:
    """`chart` draws (bytes, accuracy) of every cell into axes. `learning`: say how many runs are above `LEARNED`."""
    runs = read_runs(study)
    cells = by_memory(by_cell(runs))
    best = {cell: best_rate(group, lambda run: run["accuracy"]) for cell, group in cells.items()}
    seeds = {cell: by_seed(group, lambda run: run["accuracy"]) for cell, group in best.items()}
    rows, points = [], {}
    for cell, group in best.items():
        if not group:
            rows.append([cell, "failed", *[""] * 5])
            continue
        values = list(seeds[cell].values())
        points[cell] = (group[0]["cache_bytes"], statistics.mean(values))
        rates = sorted({run["settings"]["lr"] for run in cells[cell]})
        rate = f"{group[0]['settings']['lr']:g}" + (f" of {', '.join(map(str, rates))}" if len(rates) > 1 else "")
        single = f" ({', '.join(f'{value:.2f}' for value in values)})" if wide(values) else ""
        count = f"{sum(value > LEARNED for value in values)} of {len(values)}" if learning else str(len(values))
        gain = against(seeds.get(without_caching(cell)), seeds[cell])
        rows.append(
            [
                cell,
                spread(values) + single,
                gain,
                count,
                rate,
                str(group[0]["cache_bytes"]),
                str(group[0]["parameters"]),
            ]
        )
    head = ["cell", "accuracy", "against `none`", "learned" if learning else "seeds", "learning rate"]
    head += ["bytes kept", "parameters"]
    if not any(row[2] for row in rows):  # a study without cells that cache nothing
        head, *rows = ([*row[:2], *row[3:]] for row in (head, *rows))
    parts = [markdown(head, rows), origin(study, runs)]
    if chart:
        title = "Accuracy against the bytes kept of a sequence" + ", 64 pairs" * (chart is most_pairs)
        parts.insert(0, Figure(study, title, lambda axes: chart(axes, points)))
    return parts


def bursts() -> list[str | Figure]:
    """Recall and the segments that were kept, by read rule and borders; each against borders of one length."""
    runs = read_runs("bursts")
    cells = by_cell(run for run in runs if "error" not in run)
    seeds = {cell: by_seed(group, lambda run: run["accuracy"]) for cell, group in cells.items()}
    rows = []
    for cell, group in cells.items():
        gain = against(seeds.get(f"{cell.partition(', ')[0]}, constant"), seeds[cell])
        kept = spread([run["segments"] for run in group], 1)
        rows.append([cell, spread([*seeds[cell].values()]), gain, kept, str(group[0]["parameters"]), str(len(group))])
    head = ["read rule, borders", "accuracy", "against constant", "segments kept", "parameters", "seeds"]
    return [markdown(head, rows), origin("bursts", runs)]


def without_caching(cell: str) -> str:
    """The cell of the same memory that caches nothing: "linear grm, 64 pairs" gives "linear none, 64 pairs"."""
    rule, comma, rest = cell.partition(", ")
    memory, _, read = rule.partition(" ")
    return f"{memory} none{comma}{rest}" if read not in ("", "none") else ""


def needle() -> list[str | Figure]:
    runs = read_runs("needle")
    maps, table = needles(runs)
    lengths = list(next(iter(next(run for run in runs if "heat" in run)["heat"].values())))
    title = "Accuracy by length and place of the needle"
    picture = Figure("needle", title, lambda axes: heat(axes, maps, lengths), height=2.4)
    return [picture, table, origin("needle", runs)]


def needles(runs: list[dict]) -> tuple[dict[str, list[list[float]]], str]:
    """Accuracy by length and place of the cells of kind 2, and the table of all cells by length."""
    rows, maps = [], {}
    lengths = list(next(iter(next(run for run in runs if "heat" in run)["heat"].values())))
    for cell, group in sorted(by_cell(run_by_rule(runs, "heat")).items(), key=lambda pair: pair[0].split(", ")[::-1]):
        group = best_rate(group, lambda run: statistics.mean(run["heat"][lengths[0]]))
        values = {n: [statistics.mean(run["heat"][n]) for run in group] for n in lengths}
        rows.append([cell, *(spread(values[n], 2) for n in lengths), str(len(group))])
        if cell.endswith(", 2"):
            by_place = [zip(*(run["heat"][n] for run in group), strict=True) for n in lengths]
            maps[cell] = [[statistics.mean(seeds) for seeds in places] for places in by_place]
    return maps, markdown(["read rule, kind", *(f"{n} tokens" for n in lengths), "seeds"], rows)


def run_by_rule(runs: list[dict], field: str) -> list[dict]:
    """One run for every read rule that a trained model was evaluated with; the cell's name gets the rule."""
    split = []
    for run in runs:
        for place, (rule, value) in enumerate(run.get(field, {}).items()):
            name, comma, rest = run["cell"].partition(", ")
            cell = run["cell"] if place == 0 else rule + comma + rest
            split.append(run | {"cell": cell, field: value, "own": place == 0})
    return split


def language(study: str) -> list[str | Figure]:
    runs = read_runs(study)
    rules = by_cell(run_by_rule(runs, "losses"))
    ranges = list(runs[0]["losses"][runs[0]["settings"].get("aggregation", "grm")])
    late = {cell: by_seed(group, lambda run: run["losses"][ranges[-1]]["nats"]) for cell, group in rules.items()}
    rows, lines = [], {}
    for cell, group in rules.items():
        values = {part: [run["losses"][part]["nats"] for run in group] for part in ranges}
        name = cell if group[0]["own"] else f"{cell} (trained with none)"
        gain = against(late.get("none" + "".join(cell.partition(", ")[1:])), late[cell])
        rows.append([name, *map(spread, values.values()), gain, str(group[0]["parameters"])])
        lines[cell] = [(int(part.split("-")[1]), statistics.mean(v)) for part, v in values.items()]
    labels = ("position in the file, bytes", "nats per byte")
    picture = Figure(study, "Loss against position", lambda axes: curves(axes, lines, labels, "x"))
    head = ["read rule", *(f"bytes {part}" for part in ranges), "last range against `none`", "parameters"]
    errors = [part["error"] for group in rules.values() for run in group for part in run["losses"].values()]
    files = (
        f"{runs[0]['data']['held_out_files']} held-out files; the standard error over files is about "
        f"{statistics.median(errors):.2f}, much of it shared, as all models read the same files"
    )
    return [picture, markdown(head, rows), f"{origin(study, runs)} · {files}"]


def by_task(study: str, control: str) -> list[str | Figure]:
    """The tables of a study of several tasks, whose cells are called "task: cell" or "task kind: cell".

    Args:
        control: the cell of the language models with which the others of the same seed are compared.
    """
    runs, tasks = read_runs(study), {"recall": [], "needle": [], "language": []}
    for run in runs:
        task, _, cell = run["cell"].partition(": ")
        task, *kind = task.split()
        tasks[task].append(run | {"cell": ", ".join([cell, *kind])})
    tables = {
        "recall": recall_read_as,
        "needle": lambda some: needles(some)[1],
        "language": lambda some: far_language(some, control),
    }
    return [*(tables[task](some) for task, some in tasks.items() if some), origin(study, runs)]


def recall_read_as(runs: list[dict]) -> str:
    """Accuracy as trained, and of the same weights read with the k best memories."""
    rows, found = [], {k: None for run in runs for k in run.get("read_as", ())}
    for cell, group in by_cell(run for run in runs if "error" not in run).items():
        by_k = {k: [run["read_as"][k] for run in group if k in run.get("read_as", ())] for k in found}
        sparse = [spread(values) if values else "" for values in by_k.values()]
        accuracy = [run["accuracy"] for run in group]
        rows.append([cell, spread(accuracy), *sparse, f"{sum(a > LEARNED for a in accuracy)} of {len(group)}"])
    return markdown(["recall", "accuracy", *(f"read as ssc, k = {k}" for k in found), "learned"], rows)


def far_language(runs: list[dict], control: str) -> str:
    """Loss by position; in the last range also on bytes that repeat what stood over a segment ago, and on others."""
    cells = by_cell(run for run in runs if "error" not in run)
    ranges = list(next(iter(next(run for run in runs if "losses" in run)["losses"].values())))
    last = ranges[-1]

    def value(kind: str, part: str) -> Callable[[dict], float]:
        return lambda run: next(iter(run["losses"].values()))[part][kind]

    rows = []
    for cell, group in cells.items():
        row = [cell, *(spread([value("nats", part)(run) for run in group]) for part in ranges)]
        for kind in ("nats", "repeated", "new"):
            of_control = by_seed(cells.get(control, []), value(kind, last))
            row.append("" if cell == control else against(of_control, by_seed(group, value(kind, last))))
        rows.append([*row, str(len(group))])
    differences = [f"{last}, {kind} against {control!r}" for kind in ("all", "repeated", "other bytes")]
    return markdown(["language", *(f"bytes {part}" for part in ranges), *differences, "seeds"], rows)


def language_cost() -> list[str]:
    results = json.loads((RESULTS / "language-cost.json").read_text(encoding="utf-8"))
    plain, rows = results["models"][0], []
    for row in results["models"]:
        line = [row["model"]]
        for work in ("training", "reading"):
            speed = row[f"{work}_tokens_per_second"]
            ratio = speed / plain[f"{work}_tokens_per_second"]
            line += [f"{speed} ({ratio:.2f})", f"{row[f'{work}_peak_mib']:.0f}"]
        rows.append([*line, str(row["cache_bytes"])])
    head = ["read rule", "training, bytes/s", "peak MiB", "reading, bytes/s", "peak MiB", "bytes kept"]
    rounds = f"median of {results['rounds']} interleaved rounds"
    source = f"`python -m benchmarks.measure.language_cost` · {rounds} · {measured_on(results['machine'])}"
    return [markdown(head, rows), source]


def measured_on(machine: dict) -> str:
    return (
        f"commit {machine['commit'][:12]} · {machine['cpu']}, {machine['threads']} threads, load "
        f"{machine['load before the run']} before the run · torch {machine['torch']}, Python {machine['python']}"
    )


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent of a power law through (x, y), by least squares of the logarithms."""
    x, y = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    return statistics.linear_regression(x, y).slope


def cost() -> list[str | Figure]:
    """Time, memory and decoding of one layer against length."""
    path = RESULTS / "cpu-long.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    tables, lines = [], {}
    for what, kind in {"training": "forward+backward", "prefill": "forward"}.items():
        rows = [(row["case"], row["length"], 1e3 * row["ms"]) for row in results["layer"] if row["pass"] == kind]
        lines[what] = per_token(rows)
        tables += [per_token_table(f"{what}, µs per token", lines[what])]
    rows = [(row["case"], row["length"], 1024 * row["mib"]) for row in results["memory"]]
    tables += [per_token_table("peak memory of training, KiB per token", per_token(rows))]
    fields = [key for key in results["decode"][0] if key != "case"]
    rows = [
        [row["case"], *(f"{row[key]:.2f}" if "ms" in key else str(row[key]) for key in fields)]
        for row in results["decode"]
    ]
    tables += [markdown(["decoding, one layer, one row", *fields], rows)]
    labels = ("tokens", "µs per token, forward + backward")
    long = {case: points for case, points in lines["training"].items() if len(points) > 1}
    picture = Figure("measured_cost", "Time per token against length", lambda axes: curves(axes, long, labels, "xy"))
    source = f"`benchmarks/measure/cpu.py`, `benchmarks/results/{path.name}` · {measured_on(results['machine'])}"
    return [picture, *tables, source]


def per_token(rows: Iterable[tuple[str, int, float]]) -> dict[str, list[tuple[float, float]]]:
    """(length, value / length) of every case, from (case, length, value)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for case, length, value in rows:
        lines.setdefault(case, []).append((length, value / length))
    return lines


def per_token_table(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    lengths = sorted({length for points in lines.values() for length, _ in points})
    rows = []
    for case, points in lines.items():
        cells = [f"{dict(points)[n]:.1f}" if n in dict(points) else "" for n in lengths]
        slopes = [f"{1 + slope(points):.2f}", f"{1 + slope(points[-2:]):.2f}"] if len(points) > 2 else ["", ""]
        rows.append([case, *cells, *slopes])
    return markdown([title, *map(str, lengths), "exponent", "at the end"], rows)


def beside_others() -> list[str]:
    """Ratios between layers, and to other packages, of every run of the CPU benchmark."""
    parts = []
    for path in sorted(RESULTS.glob("cpu*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        machine, rows = results["machine"], [[name, f"{ratio:.2f}"] for name, ratio in results["ratios"].items()]
        packages = [f" · {name} {machine[name]}" for name in ("memory-caching", "titans-pytorch") if name in machine]
        source = f"`benchmarks/results/{path.name}` · {measured_on(machine)}{''.join(packages)}"
        parts += [markdown(["ratio in one run, forward and backward unless named", ""], rows), source]
    return parts


PARTS: dict[str, Callable[[], list[str | Figure]]] = {
    "mqar": lambda: recall("mqar", scatter),
    "mqar_64": lambda: recall("mqar_64"),
    "mqar_256": lambda: recall("mqar_256", most_pairs),
    "mqar_512": lambda: recall("mqar_512", scatter),
    "ablations": lambda: recall("ablations"),
    "bursts": bursts,
    "vectors": lambda: recall("vectors", learning=False),
    "needle": needle,
    "anchored": lambda: by_task("anchored", "closed"),
    "annealed": lambda: by_task("annealed", "none"),
    "quotes": lambda: by_task("quotes", "closed"),
    "cells": lambda: by_task("cells", "lstm none"),
    "language": lambda: language("language"),
    "language_1024": lambda: language("language_1024"),
    "language_8m": lambda: language("language_8m"),
    "language_30m": lambda: language("language_30m"),
    "language-cost": language_cost,
    "cpu-long": cost,
    "cpu": beside_others,
}
