# Copyright 2026 the mc-transformers authors.
"""The tables of streams and of sequences that are not text."""

import json
import statistics
from collections.abc import Callable

from benchmarks.report import tables
from benchmarks.report.tables import by_cell, markdown, measured_on, read_runs, spread


def record(name: str) -> dict:
    return json.loads((tables.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def of_an_example(name: str, columns: dict[str, str], digits: int) -> str:
    """One row per model; `columns`: heads of the table by field of a run."""
    runs = read_runs(name)
    rows = []
    for cell, group in by_cell(runs).items():
        numbers = [spread([run[field] for run in group], digits) for field in columns]
        seconds = f"{statistics.mean(run['seconds'] for run in group):.0f}"
        rows.append([cell, *numbers, str(group[0]["parameters"]), str(len(group)), seconds])
    return markdown(["model", *columns.values(), "parameters", "seeds", "seconds"], rows)


def dna() -> list[str]:
    chains = read_runs("dna")[0]["markov_bits"]
    table = of_an_example("dna", {"bits": "bits per nucleotide", "bits_last_half": "last half of a stretch"}, 4)
    chain = ", ".join(f"order {order} {bits:.4f}" for order, bits in chains.items())
    return [table, f"Markov chains, in bits: {chain}", "`python examples/dna.py --get --seed 0` and with 1 and 2"]


def forecast() -> list[str]:
    columns = {"mae": "mean absolute error, GW", "rmse": "root mean square", "mae_last_quarter_of_a_day": "18 h on"}
    return [of_an_example("forecast", columns, 4), "`python examples/forecast.py --seed 0` and with 1 and 2"]


def stream() -> list[str]:
    found = record("stream")
    resident, settings = found["resident_mib"], found["settings"]
    rows = [
        ["tokens read", f"{found['tokens']:,}"],
        ["segments kept per layer", str(settings["max_cached_segments"])],
        ["bytes that the stream holds", f"{found['stream_bytes']:,}"],
        ["resident memory after a tenth, MiB", f"{resident['first']:.1f}"],
        ["least and most from then on, MiB", f"{resident['least']:.1f} and {resident['most']:.1f}"],
        ["spread of the resident memory", f"{found['resident_spread']:.2%}"],
        ["logits against a fresh pass, largest of ten", f"{found['drift']['most']:.1e}"],
        ["the same, after the last token", f"{found['drift']['last']:.1e}"],
        ["position to which counters were moved", f"{found['position_at_the_end']:,}"],
        ["scores there against scores here", f"{found['score_difference_beyond_2_to_31']:.1e}"],
    ]
    return [markdown(["soak", ""], rows), f"`python -m benchmarks.measure.stream` · {measured_on(found['machine'])}"]


def state_bytes() -> list[str]:
    found = record("state_bytes")
    exact = {row["segments"]: row["nats"] for row in found["rows"] if row["dtype"] == "fp32"}
    rows = [
        [
            f"{row['segments'] or 'all'} {row['dtype']}",
            f"{row['nats']:.4f}",
            f"{row['nats'] - exact[row['segments']]:+.4f}",
            f"{row['state_bytes']:,}",
            f"{row['bytes']:,}",
        ]
        for row in found["rows"]
    ]
    head = ["segments kept, stored as", "nats per byte", "against fp32", "bytes of kept states", "of the cache"]
    source = f"`python -m benchmarks.measure.state_bytes` · {measured_on(found['machine'])}"
    return [markdown(head, rows), source]


PARTS: dict[str, Callable[[], list[str]]] = {
    "stream": stream,
    "state_bytes": state_bytes,
    "dna": dna,
    "forecast": forecast,
}
