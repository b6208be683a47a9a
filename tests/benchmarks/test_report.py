"""docs/results.md holds what the result files hold."""

import json
from pathlib import Path

import pytest

from benchmarks.report import page as report
from benchmarks.report import tables


ROOT = Path(__file__).parents[2]


def test_the_committed_page_fits_the_committed_files(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out
    _, figures = report.made(report.PAGE.read_text(encoding="utf-8"))
    assert len(figures) > 5
    for figure in figures:
        assert (report.IMAGES / f"{figure.name}.svg").stat().st_size < 200_000


def write(path: Path, cell: str, rate: float, seed: int, **result) -> None:
    record = {
        "study": "mqar",
        "cell": cell,
        "settings": {"lr": rate, "seed": seed},
        "commit": "abc",
        "machine": "CPU",
        "versions": {"torch": "2", "python": "3"},
        "cache_bytes": 8,
        "parameters": 9,
    }
    with path.open("a") as file:
        file.write(json.dumps(record | result) + "\n")


@pytest.fixture
def results(tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    page.write_text("Words before.\n\n<!-- made: mqar -->\nold\n<!-- end: mqar -->\n\nWords behind.\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name, value in {"IMAGES": tmp_path, "PAGE": page, "ROOT": tmp_path}.items():
        monkeypatch.setattr(report, name, value)
    return tmp_path


def test_the_best_rate_is_chosen_over_seeds_and_failures_are_counted(results):
    path = results / "mqar.jsonl"
    for seed, (low, high) in enumerate([(0.5, 0.9), (0.5, 0.2)]):
        write(path, "linear none", 0.1, seed, accuracy=low)
        write(path, "linear none", 0.2, seed, accuracy=high)
        write(path, "linear grm", 0.1, seed, accuracy=low - 0.1)
    write(path, "linear grm", 0.2, 0, error="RuntimeError: no")
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = (results / "results.md").read_text()
    assert text.startswith("Words before.") and text.endswith("Words behind.\n") and "old" not in text
    assert "| linear none | 0.550 ± 0.495 (0.90, 0.20) |  | 2 of 2 | 0.2 of 0.1, 0.2 | 8 | 9 |" in text
    assert "| linear grm | 0.400 ± 0.000 | -0.150 | 2 of 2 | 0.1 of 0.1, 0.2 | 8 | 9 |" in text
    assert "7 runs, 1 failed" in text
    assert (results / "mqar.svg").read_text().startswith("<?xml")
    write(path, "linear none", 0.3, 0, accuracy=1.0)
    assert report.main(["--check"]) == 1


def test_a_difference_is_taken_over_the_seeds_that_both_have():
    plain = {0: 0.5, 1: 0.1}
    assert tables.against(plain, {0: 0.7, 1: 0.5}) == "+0.300"
    assert tables.against(plain, {0: 0.7, 2: 0.9}) == "+0.200 [1]"
    assert tables.against(plain, plain) == tables.against(None, plain) == tables.against(plain, {2: 0.9}) == ""


def test_no_marker_is_wrong_and_no_study_is_hidden(results):
    write(results / "mqar.jsonl", "linear none", 0.1, 0, accuracy=0.5)
    write(results / "mqar_64.jsonl", "linear none", 0.1, 0, accuracy=0.5)
    with pytest.raises(ValueError, match="no markers for mqar_64"):
        report.main([])
    report.PAGE.write_text("<!-- made: mqar -->\n<!-- end: mqar -->\n<!-- made: nothing -->\n<!-- end: nothing -->\n")
    with pytest.raises(ValueError, match="markers of nothing"):
        report.main([])


def test_a_study_of_several_tasks_is_compared_seed_by_seed(results, monkeypatch):
    def losses(far: float, new: float) -> dict:
        return {"losses": {"grm": {"0-8": {"nats": 2.0}, "8-16": {"nats": 1.5, "repeated": far, "new": new}}}}

    write(results / "cells.jsonl", "language: lstm none", 0.1, 0, **losses(1.0, 2.0))
    write(results / "cells.jsonl", "language: lstm grm", 0.1, 0, **losses(0.75, 2.125))
    write(results / "cells.jsonl", "language: lstm grm", 0.1, 1, **losses(9.0, 9.0))
    write(results / "cells.jsonl", "recall: gru ssc", 0.1, 0, accuracy=0.5, read_as={"1": 0.25})
    write(results / "cells.jsonl", "recall: gru grm", 0.1, 0, error="RuntimeError: no")
    text = "\n".join(map(str, tables.PARTS["cells"]()))
    assert "| lstm grm | 2.000 ± 0.000 | 1.500 ± 0.000 | +0.000 [1] | -0.250 [1] | +0.125 [1] | 2 |" in text
    assert "| gru ssc | 0.500 | 0.250 | 1 of 1 |" in text and "5 runs, 1 failed" in text


def test_slope_is_the_exponent_of_a_power_law():
    assert tables.slope([(n, 3 * n**1.7) for n in (1, 2, 8)]) == pytest.approx(1.7)


def test_bursts_are_compared_with_borders_of_one_length(results):
    for cell, accuracy, segments in (("grm, constant", 0.5, 16.0), ("grm, budget", 0.75, 15.5)):
        for seed in (0, 1):
            write(results / "bursts.jsonl", cell, 0.1, seed, accuracy=accuracy, segments=segments)
    table = str(tables.bursts()[0])
    assert "| grm, budget | 0.750 ± 0.000 | +0.250 | 15.5 ± 0.0 | 9 | 2 |" in table
    assert "| grm, constant | 0.500 ± 0.000 |  | 16.0 ± 0.0 | 9 | 2 |" in table
