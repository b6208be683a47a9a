# Copyright 2026 the mc-transformers authors.
"""Make docs/results.md and its figures from the JSON files of benchmarks/results.

    python -m benchmarks.report.page
    python -m benchmarks.report.page --check      # write nothing, fail if the page does not fit the files

Every number of the page comes from a file, and every table names the command, the commit and the machine.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.report.figures import Figure, curves, heat, most_pairs, scatter


ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md", ROOT / "docs" / "images"
LEARNED = 0.1  # accuracy of recall above which a run has begun to learn, where guessing gives less
HEAD = "<!-- written by benchmarks/report/page.py from the files of benchmarks/results: edit those -->\n# Results\n"


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


# ------------------------------------------------------------------------------------------------------ the sections
def recall(
    study: str, title: str, about: str, chart: Callable | None = None, learning: bool = True
) -> list[str | Figure]:
    """`chart` draws (bytes, accuracy) of every cell into axes. `learning`: say how many runs are above `LEARNED`."""
    runs = read_runs(study)
    if not runs:
        return []
    rows, points, seeds = [], {}, {}
    for cell, group in by_memory(by_cell(runs)).items():
        best = best_rate(group, lambda run: run["accuracy"])
        rates = sorted({run["settings"]["lr"] for run in group})
        if not best:
            rows.append([cell, "failed", *[""] * 4])
            continue
        values = [run["accuracy"] for run in best]
        points[cell] = (best[0]["cache_bytes"], statistics.mean(values))
        seeds[cell] = {run["settings"]["seed"]: run["accuracy"] for run in best}
        rate = f"{best[0]['settings']['lr']:g}" + (f" of {', '.join(map(str, rates))}" if len(rates) > 1 else "")
        sizes = (str(best[0]["cache_bytes"]), str(best[0]["parameters"]))
        single = f" ({', '.join(f'{value:.2f}' for value in values)})" if wide(values) else ""
        count = f"{sum(value > LEARNED for value in values)} of {len(values)}" if learning else str(len(values))
        rows.append([cell, spread(values) + single, count, rate, *sizes])
    parts = [f"## {title}", about]
    if chart is scatter:
        parts.append(against_none(seeds))
    if chart:
        title = "Accuracy against the bytes kept of a sequence" + ", 64 pairs" * (chart is most_pairs)
        parts.append(Figure(study, title, lambda axes: chart(axes, points)))
    count = "seeds that learned" if learning else "seeds"
    head = ["cell", "accuracy", count, "learning rate", "bytes kept", "parameters"]
    return [*parts, markdown(head, rows), origin(study, runs)]


def against_none(seeds: dict[str, dict[int, float]]) -> str:
    """Which read rules are above the same memory without caching, and which are below, over the seeds of both."""
    above, below = [], []
    for cell, values in seeds.items():
        memory, _, read = cell.partition(" ")
        plain = seeds.get(f"{memory} none", {})
        common = sorted(values.keys() & plain.keys())
        if read and read != "none" and common:
            gain = statistics.mean(values[seed] - plain[seed] for seed in common)
            (above if gain > 0 else below).append((gain, f"{cell} [{len(common)}]"))
    words = []
    for group, what, order in ((above, "Above", -1), (below, "Not above", 1)):
        listed = ", ".join(f"{cell} ({gain:+.3f})" for gain, cell in sorted(group, key=lambda pair: order * pair[0]))
        words.append(f"{what} `none` of the same memory: {listed or 'none of the cells'}.")
    return " ".join(words) + " In brackets the seeds that both have."


def needle() -> list[str | Figure]:
    runs = read_runs("needle")
    if not runs:
        return []
    rows, maps = [], {}
    lengths = list(next(iter(next(run for run in runs if "heat" in run)["heat"].values())))
    for cell, group in sorted(by_cell(run_by_rule(runs, "heat")).items(), key=lambda pair: pair[0].split(", ")[::-1]):
        group = best_rate(group, lambda run: statistics.mean(run["heat"][lengths[0]]))
        values = {n: [statistics.mean(run["heat"][n]) for run in group] for n in lengths}
        rows.append([cell, *(spread(values[n], 2) for n in lengths), str(len(group))])
        if cell.endswith(", 2"):
            by_place = [zip(*(run["heat"][n] for run in group), strict=True) for n in lengths]
            maps[cell] = [[statistics.mean(seeds) for seeds in places] for places in by_place]
    about = (
        "A value of 7 digits (1, 2) or 32 hexadecimal digits (3) is hidden once in a repeated line (1) or in tokens "
        "of Zipf frequencies (2, 3), and asked for at the end. Two layers of width 32 with a linear memory (or "
        f"`dla`), segments of 32 tokens, trained for 600 steps at {lengths[0]} tokens with the needle anywhere; a "
        "value counts if all its digits are right. `mean` is the model trained with `none`, read with caching "
        "afterwards, which changes nothing where states have no decay (they add up to that of `none`, and the norm "
        "of the heads takes away the factor); `soup` of a linear memory would be `grm`. Mean over 8 depths of 32 "
        "sequences each, at the learning rate that is best at the length of training (attention had two). Attention "
        "has rotary positions and no convolution: near 0 at the length of training it has not learned the task, and "
        "the memories have not learned the long values of kind 3."
    )
    parts = ["## Needle in a haystack", about]
    if maps:
        title = "Accuracy by length and place of the needle"
        parts.append(Figure("needle", title, lambda axes: heat(axes, maps, lengths), height=2.4))
    head = ["read rule, kind", *(f"{n} tokens" for n in lengths), "seeds"]
    return [*parts, markdown(head, rows), origin("needle", runs)]


def run_by_rule(runs: list[dict], field: str) -> list[dict]:
    """One run for every read rule that a trained model was evaluated with; the cell's name gets the rule."""
    split = []
    for run in runs:
        for place, (rule, value) in enumerate(run.get(field, {}).items()):
            name, comma, rest = run["cell"].partition(", ")
            cell = run["cell"] if place == 0 else rule + comma + rest
            split.append(run | {"cell": cell, field: value, "own": place == 0})
    return split


def language(study: str, title: str, about: str) -> list[str | Figure]:
    runs = read_runs(study)
    if not runs:
        return []
    rules = by_cell(run_by_rule(runs, "losses"))
    ranges = list(runs[0]["losses"][runs[0]["settings"].get("aggregation", "grm")])
    rows, lines = [], {}
    for cell, group in rules.items():
        values = {part: [run["losses"][part]["nats"] for run in group] for part in ranges}
        own = group[0]["own"]
        size = str(group[0]["parameters"])
        name = cell if own else f"{cell} (trained with none)"
        rows.append([name, *(spread(v) for v in values.values()), size])
        lines[cell] = [(int(part.split("-")[1]), statistics.mean(v)) for part, v in values.items()]
    files = runs[0]["data"]["held_out_files"]
    errors = [part["error"] for group in rules.values() for run in group for part in run["losses"].values()]
    about += (
        f" Loss in nats per byte on the first 4096 bytes of {files} held-out files, by position. The standard error "
        f"over files is about {statistics.median(errors):.2f}, much of it shared, as all models read the same files; "
        "± is over seeds."
    )
    labels = ("position in the file, bytes", "nats per byte")
    picture = Figure(study, "Loss against position", lambda axes: curves(axes, lines, labels, "x"))
    head = ["read rule", *(f"bytes {part}" for part in ranges), "parameters"]
    words = [late(rules, ranges[-1]), *gains(rules, ranges[-1])]
    return [f"## {title}", about, " ".join(words), picture, markdown(head, rows), origin(study, runs)]


def language_cost() -> list[str]:
    path = RESULTS / "language-cost.json"
    if not path.exists():
        return []
    results = json.loads(path.read_text(encoding="utf-8"))
    plain, rows = results["models"][0], []
    for row in results["models"]:
        line = [row["model"]]
        for work in ("training", "reading"):
            speed = row[f"{work}_tokens_per_second"]
            ratio = speed / plain[f"{work}_tokens_per_second"]
            line += [f"{speed} ({ratio:.2f})", f"{row[f'{work}_peak_mib']:.0f}"]
        rows.append([*line, str(row["cache_bytes"])])
    about = (
        "Training steps of 16 x 256 bytes, and reading a document of 4096 bytes in one pass, with the models of the "
        f"study at T = 256: median of {results['rounds']} interleaved rounds in bytes per second (in brackets: times "
        f"`{plain['model']}`), MiB that one pass adds to the process, and bytes of the cache after the document."
    )
    head = ["read rule", "training, bytes/s", "peak MiB", "reading, bytes/s", "peak MiB", "bytes kept"]
    source = f"`python -m benchmarks.measure.language_cost` · {measured_on(results['machine'])}"
    return ["## What the language models cost", about, markdown(head, rows), source]


def measured_on(machine: dict) -> str:
    return (
        f"commit {machine['commit'][:12]} · {machine['cpu']}, {machine['threads']} threads, load "
        f"{machine['load before the run']} before the run · torch {machine['torch']}, Python {machine['python']}"
    )


def late(rules: dict[str, list[dict]], part: str) -> str:
    """Who predicts the last bytes better than `none` of the same memory, in words; a cell is "rule[, memory]"."""
    memories: dict[str, dict[str, float]] = {}
    for cell, group in rules.items():
        if group[0]["own"]:
            memory = "".join(cell.partition(", ")[1:])
            loss = statistics.mean(run["losses"][part]["nats"] for run in group)
            memories.setdefault(memory, {})[cell.removesuffix(memory)] = loss
    sentences = []
    for memory, means in memories.items():
        plain = means.pop("none", None)
        if plain is None or not means:
            continue
        gaps = sorted((loss - plain, rule) for rule, loss in means.items())
        better, worse = (
            [f"{rule} ({gap:+.3f})" for gap, rule in gaps if (gap < 0) == wanted] for wanted in (True, False)
        )
        sentences.append(
            f"In bytes {part}, where caching should help, below the loss of `none{memory}`: "
            f"{', '.join(better) or 'nothing'}; not below: {', '.join(worse) or 'nothing'}."
        )
    return " ".join(sentences)


def gains(rules: dict[str, list[dict]], part: str) -> list[str]:
    """What reading with `mean` does to the last bytes of the model trained with `none`, in words."""
    sentences = []
    for cell in rules:
        rule, comma, memory = cell.partition(", ")
        if rule.startswith("mean"):
            plain = "none" + comma + memory
            changes = [
                after["losses"][part]["nats"] - before["losses"][part]["nats"]
                for after, before in zip(rules[cell], rules[plain], strict=True)
            ]
            sentences.append(f"`{rule}` changes the loss of `{plain}` there by {spread(changes)}.")
    return sentences


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent of a power law through (x, y), by least squares of the logarithms."""
    x, y = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    return statistics.linear_regression(x, y).slope


def cost() -> list[str | Figure]:
    """Curves from the run of longer lengths if there is one, ratios beside other packages from all runs."""
    path = next((path for name in ("cpu-long", "cpu") if (path := RESULTS / f"{name}.json").exists()), None)
    if path is None:
        return []
    results = json.loads(path.read_text(encoding="utf-8"))
    passes = {"training": "forward+backward", "prefill": "forward"}
    tables, lines = [], {}
    for what, kind in passes.items():
        rows = [(row["case"], row["length"], 1e3 * row["ms"]) for row in results["layer"] if row["pass"] == kind]
        lines[what] = per_token(rows)
        tables += [per_token_table(f"{what}, µs per token", lines[what])]
    rows = [(row["case"], row["length"], 1024 * row["mib"]) for row in results["memory"]]
    tables += [per_token_table("peak memory of training, KiB per token", per_token(rows))]
    if results["decode"]:
        fields = [key for key in results["decode"][0] if key != "case"]
        rows = [
            [row["case"], *(f"{row[key]:.2f}" if "ms" in key else str(row[key]) for key in fields)]
            for row in results["decode"]
        ]
        tables += [markdown(["decoding, one layer, one row", *fields], rows)]
    about = (
        "One layer (width 256, 4 heads, segments of 64, k = 2, fp32, batch 1) alone: time of forward and backward "
        "(training) and of forward (prefill), and what the former adds to the memory of a process of its own, per "
        "token. Exponents are of the whole against length, 1 is linear, 2 quadratic: fitted over all lengths, "
        "and between the last two. "
    )
    ends = {case: 1 + slope(points[-2:]) for case, points in lines["training"].items() if len(points) > 2}
    steep = ", ".join(f"{case} ({end:.2f})" for case, end in ends.items() if end > 1.3)
    about += f"In training above 1.3 between the last two: {steep or 'none'}."
    labels = ("tokens", "µs per token, forward + backward")
    long = {case: points for case, points in lines["training"].items() if len(points) > 1}
    picture = Figure("measured_cost", "Time per token against length", lambda axes: curves(axes, long, labels, "xy"))
    source = f"`benchmarks/measure/cpu.py`, `benchmarks/results/{path.name}` · {measured_on(results['machine'])}"
    return ["## Cost against length", about, picture, *tables, source, *beside_others()]


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
    """The ratios of the CPU benchmark's runs."""
    parts = []
    for path in sorted(RESULTS.glob("cpu*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        machine, rows = results["machine"], [[name, f"{ratio:.2f}"] for name, ratio in results["ratios"].items()]
        packages = [f" · {name} {machine[name]}" for name in ("memory-caching", "titans-pytorch") if name in machine]
        source = f"`benchmarks/results/{path.name}` · {measured_on(machine)}{''.join(packages)}"
        parts += [markdown(["ratio in one run, forward and backward unless named", ""], rows), source]
    return parts


SETTING = (
    "32 pairs of keys and values in 128 tokens, each asked for once, 128 ids; two layers with one head of width 16 "
    "and no MLP, segments of 16 tokens, k = 2, 2000 steps of 16 fresh sequences. Accuracy over all queries of 256 "
    "test sequences, mean ± standard deviation over seeds, at the best of the learning rates tried (the table "
    "names them: two for the main rules of matrices and deep memories). A run below "
    f"{LEARNED} had not begun to learn when the steps were over: it says more about 2000 steps than about the memory. "
    "For memories that are matrices or vectors `soup` is `grm`. The setting was chosen after short trials of four "
    "others, for a state too small to hold all pairs; those runs were not kept. In one of the four (64 tokens, 16 "
    "pairs, segments of 8) `grm` had stayed clearly below `none`; run again with the model and the ids of this study, "
    "it is above (`Recall from 64 tokens`). The commits of some rows were entered afterwards, as that of the code the "
    "process had started with."
)
ABLATION = (
    "The task and model above with a linear memory, one thing changed at a time. `u is q` shares the query of the "
    "gate with that of the memory (a row that the paper left empty); `checkpoint` starts a segment from the last "
    "state (promised in the paper, absent there). `gate without segment context` scores where a segment is (sines and "
    "cosines of its positions) and not what it holds. No gate is `residual` above; deep memories are above too."
)
SHORTER = (
    "The same model and task with 16 pairs in 64 tokens and segments of 8, everything else as above: a state holds "
    "most of the pairs, and gates still gain. Attention recalls nearly all, and keeps fewer bytes than they do."
)
LONGER = (
    "The same task in 256 tokens with 256 ids, everything else as above; two learning rates for the main rules of a "
    "linear memory at 64 pairs and width 32 (the higher is worse in every mean), one elsewhere. Three seeds of a "
    "linear memory and of attention at width 32 and at 64 pairs, one of everything else. `grm` is above "
    "`none` of a linear memory at every size, by little where the state holds all pairs, and of the other memories "
    "except DLA, which needs no caching. `ssc` comes close to `none` more often than to `grm`. "
    "Titans had not begun to learn without gates, nor with logarithmic segments; DLA lost a quarter by `residual`, "
    "and had not begun to learn with `ssc`. Per byte kept caching does not gain: without it, a model of width 64 is "
    "above one of width 32 with `grm`, which keeps four times as much (and has fewer parameters), and one of width 32 "
    "above one of width 16. At width 32 the states that a linear memory keeps take as many bytes as the keys and "
    "values of attention, and `grm` recalls about as much; `ssc` reads 2 of up to 15 finished segments."
)
PUBLISHED = (
    "64 pairs in 512 tokens of 8192 ids, width 64, segments of 32, k = 2, 10,000 steps of 128 sequences: the largest "
    "setting of arXiv 2312.04927, with fresh sequences instead of 64 passes over 100,000."
)
VECTORS = (
    "A task that LSTM and GRU learn: 2 or 4 pairs in 64 tokens of 32 ids, zeros between the queries, width 64, 2000 "
    "steps of 32 sequences. It was found by trials with `none`: with random tokens between the queries, or with "
    "4 pairs, the LSTM stayed at one pair guessed right. A row says whether caching keeps what the memory can do: all "
    "pairs stand in the first segment, and there is nothing to gain. `added` is the read h_t + Σ g_i h_i instead of "
    "q ⊙ h, and h_t alone without caching: there `grm` stays below `none` for the LSTM."
)
LANGUAGE = (
    "Byte-level models of the source of Python's standard library with about as many parameters each (two layers of "
    "width 64, a gated linear memory unless named, segments of 64 bytes), trained for 500 steps of 4096 bytes at "
    "T = 256. `mean` has the weights of `none` and caches a state every 256 bytes, from segments that start anew or "
    "(`mean/checkpoint`) go on from the last state. Without a decay the first changes nothing: the states add up to "
    "that of `none`, and the norm of the heads takes away the factor."
)
LANGUAGE_1024 = (
    "Models of the section above trained at T = 1024 with segments of 128 bytes, as many bytes in all: in training "
    "they read up to seven kept segments instead of three. `mean` caches a state every 1024 bytes. "
    "Three seeds, two of `log-linear++` and `grm from the last state`. A linear memory has no decay: without caching "
    "it weighs what is far back like what is near, with `grm` it may choose, and is as good, not better."
)
LANGUAGE_8M = (
    "Some models of the section above trained for 2000 steps instead of 500, 8 million bytes, one seed. `mean` caches "
    "a state every 1024 bytes. `grm` is further behind `none` than after 2 million bytes, also from the last state, "
    "where its online memory is that of `none`: gates could leave it alone, and did not learn to."
)
LANGUAGE_30M = (
    "The models of the first section on language modelling with ten layers of width 512, 3000 steps of 65,536 bytes "
    "at T = 2048 and segments of 256 bytes. The text is small for models of this size."
)


def page() -> list[str | Figure]:
    """The parts of docs/results.md in their order."""
    return [
        HEAD + "\nSmall models on two CPU cores: what they show about reading rules may not hold at another scale. "
        "No GPU was available, so the settings of the paper (512 tokens, 64 pairs, 5 seeds; 760M and 1.3B parameters) "
        "have not been run.",
        *recall("mqar", "Recall: multi-query associative recall", SETTING, scatter),
        *recall("ablations", "Ablations", ABLATION),
        *recall("mqar_64", "Recall from 64 tokens", SHORTER),
        *recall("mqar_256", "Recall from 256 tokens", LONGER, most_pairs),
        *recall("mqar_512", "Recall from 512 tokens", PUBLISHED, scatter),
        *recall("vectors", "Recall with LSTM and GRU", VECTORS, learning=False),
        *needle(),
        *language("language", "Language modelling, and caching after training", LANGUAGE),
        *language_cost(),
        *language("language_1024", "Language modelling, trained on longer sequences", LANGUAGE_1024),
        *language("language_8m", "Language modelling, trained for longer", LANGUAGE_8M),
        *language("language_30m", "Language modelling, larger models", LANGUAGE_30M),
        *cost(),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    parts = page()
    text = "\n\n".join(map(str, parts)) + "\n"
    if options.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} {'fits' if same else 'does not fit'} the files of {RESULTS.name}/")
        return 0 if same else 1
    for part in parts:
        if isinstance(part, Figure):
            part.save(IMAGES)
    partial = PAGE.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(PAGE)
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
