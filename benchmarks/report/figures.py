# Copyright 2026 the mc-transformers authors.
"""The figures of docs/results.md: what `benchmarks/report/tables.py` draws into matplotlib axes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Figure:
    """A picture of the page: docs/images/NAME.svg, and what draws it into matplotlib axes."""

    name: str
    title: str
    draw: Callable
    height: float = 3.6

    def __str__(self) -> str:
        return f"![{self.title}](images/{self.name}.svg)"

    def save(self, folder: Path) -> None:
        """Into the folder of images; the same data give the same bytes."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        pyplot.rcParams |= {"svg.hashsalt": "mc-transformers", "font.size": 9}
        picture, axes = pyplot.subplots(figsize=(6.0, self.height), layout="constrained")
        self.draw(axes)
        partial = folder / f"{self.name}.svg.partial"
        picture.savefig(partial, format="svg", metadata={"Date": None})
        pyplot.close(picture)
        partial.replace(folder / f"{self.name}.svg")


def curves(axes, lines: dict[str, list[tuple[float, float]]], labels: tuple[str, str], log: str) -> None:
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), marker=".", label=name, color=f"C{place % 10}")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def scatter(axes, points: dict[str, tuple[int, float]]) -> None:
    """Colours are memories, marks are read rules; a line joins the sizes of one ("memory rule, size")."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell, point in points.items():
        lines.setdefault(cell.partition(", ")[0], []).append(point)
    memories = list(dict.fromkeys(name.split(" ")[0] for name in lines))
    marks = dict(zip(("none", "residual", "grm", "soup", "ssc", "log-linear++", ""), "osDP^*X", strict=True))
    for name, line in lines.items():
        memory, _, read = name.partition(" ")
        color = f"C{memories.index(memory) % 10}"
        axes.plot(*zip(*sorted(line), strict=True), marks.get(read, "X"), ls="-", lw=0.6, color=color, ms=6, alpha=0.8)
    for place, memory in enumerate(memories):
        axes.plot([], [], "s", color=f"C{place % 10}", label=memory)
    for read, mark in marks.items():
        if read:
            axes.plot([], [], mark, color="black", label=read, fillstyle="none")
    axes.set(xlabel="bytes kept of one sequence", ylabel="accuracy", xscale="log", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6.5, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))


def most_pairs(axes, points: dict[str, tuple[int, float]]) -> None:
    """Widths and memories at 64 pairs."""
    scatter(axes, {cell: point for cell, point in points.items() if ", 64 pairs" in cell})


def heat(axes, maps: dict[str, list[list[float]]], lengths: list[str]) -> None:
    width = len(next(iter(maps.values()))[0])
    gap = [[float("nan")]] * len(lengths)
    table = [[] for _ in lengths]
    for rows in maps.values():
        table = [line + row + blank for line, row, blank in zip(table, rows, gap, strict=True)]
    image = axes.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(lengths)), lengths)
    middles = [i * (width + 1) + (width - 1) / 2 for i in range(len(maps))]
    axes.set_xticks(middles, [cell.split(",")[0] for cell in maps])
    axes.set(xlabel="read rule; within each: place of the needle, first to last", ylabel="tokens")
    axes.figure.colorbar(image, label="accuracy")
