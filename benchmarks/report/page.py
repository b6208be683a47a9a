# Copyright 2026 the mc-transformers authors.
"""Fill the tables and figures of docs/results.md from the files of benchmarks/results.

    python -m benchmarks.report.page
    python -m benchmarks.report.page --check      # write nothing, fail if the page does not fit the files

The words of the page are written by hand. A table stands between two markers, `<!-- made: NAME -->` and
`<!-- end: NAME -->`, and is made anew, with its figure, command, commits and machine.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks.report import sequences, tables
from benchmarks.report.figures import Figure


ROOT = Path(__file__).resolve().parents[2]
PAGE, IMAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "images"
PARTS = tables.PARTS | sequences.PARTS
MARKED = re.compile(r"<!-- made: (?P<name>\S+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)


def made(text: str) -> tuple[str, list[Figure]]:
    """The page with new tables, and its figures.

    Raises:
        ValueError: a marker that names no table, or a study with results that no marker shows.
    """
    figures: list[Figure] = []

    def fill(marked: re.Match) -> str:
        parts = PARTS[marked["name"]]()
        figures.extend(part for part in parts if isinstance(part, Figure))
        return "\n\n".join([f"<!-- made: {marked['name']} -->", *map(str, parts), f"<!-- end: {marked['name']} -->"])

    names = [found["name"] for found in MARKED.finditer(text)]
    if unknown := set(names) - PARTS.keys():
        raise ValueError(f"{PAGE.name} has markers of {', '.join(sorted(unknown))}, allowed: {', '.join(PARTS)}")
    if hidden := {path.stem for path in tables.RESULTS.glob("*.jsonl")} - set(names):
        raise ValueError(f"{PAGE.name} has no markers for {', '.join(sorted(hidden))}: write a section about it")
    return MARKED.sub(fill, text), figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    old = PAGE.read_text(encoding="utf-8")
    new, figures = made(old)
    if options.check:
        print(f"{PAGE.name} {'fits' if new == old else 'does not fit'} the files of {tables.RESULTS.name}/")
        return int(new != old)
    for figure in figures:
        figure.save(IMAGES)
    partial = PAGE.with_suffix(".partial")
    partial.write_text(new, encoding="utf-8")
    partial.replace(PAGE)
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
