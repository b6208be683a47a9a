"""docs/results.md holds what the result files hold."""

import json
from pathlib import Path

import pytest

from benchmarks.report import page as report


ROOT = Path(__file__).parents[2]


def test_the_committed_page_fits_the_committed_files(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out
    for part in report.page():
        if isinstance(part, report.Figure):
            assert (report.IMAGES / f"{part.name}.svg").stat().st_size < 200_000


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
    for name in ("RESULTS", "IMAGES"):
        monkeypatch.setattr(report, name, tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(report, "ROOT", tmp_path)
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
    assert "| linear none | 0.550 ± 0.495 (0.90, 0.20) | 2 of 2 | 0.2 of 0.1, 0.2 | 8 | 9 |" in text
    assert "7 runs, 1 failed" in text
    assert "Not above `none` of the same memory: linear grm [2] (-0.150)." in text
    assert (results / "mqar.svg").read_text().startswith("<?xml")
    write(path, "linear none", 0.3, 0, accuracy=1.0)
    assert report.main(["--check"]) == 1


def test_slope_is_the_exponent_of_a_power_law():
    assert report.slope([(n, 3 * n**1.7) for n in (1, 2, 8)]) == pytest.approx(1.7)
