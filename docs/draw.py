"""Draws docs/images/overview.png, the picture of README.md: the way of a token, and memory against length.

Run: python docs/draw.py
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402


OUTPUT = Path(__file__).parent / "images" / "overview.png"
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9822b", "#3f9c5a", "#666666"
HEAD_DIM, HEADS, SEGMENT = 128, 12, 512  # of the curves


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 0.62) -> None:
    patch = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", fc=colour + "22", ec=colour, lw=1.6)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4})


def flow(axes: Axes) -> None:
    """Three segments, their memories, and what a token reads."""
    axes.set(xlim=(0, 10), ylim=(-0.2, 6.6))
    axes.axis("off")
    axes.set_title("one token: project, write, read, mix", fontsize=11)
    for i in range(3):
        box(axes, 0.2 + 3.3 * i, 0.3, 2.7, f"segment {i + 1}" + (" (now)" if i == 2 else ""), GREY, 0.5)
        for tick in range(1, 6):
            axes.plot([0.2 + 3.3 * i + 0.45 * tick] * 2, [0.3, 0.42], color=GREY, lw=0.8)
        arrow(axes, (1.55 + 3.3 * i, 0.92), (1.55 + 3.3 * i, 1.7), BLUE)
    axes.text(1.68, 1.22, "write (eq. 4)", fontsize=8.5, color=BLUE)
    box(axes, 0.5, 1.8, 2.1, "state 1", BLUE)
    box(axes, 3.8, 1.8, 2.1, "state 2", BLUE)
    box(axes, 7.1, 1.8, 2.1, "online memory", GREEN)
    axes.text(3.2, 1.95, "kept", fontsize=8.5, color=BLUE, ha="center")
    for i, gate in enumerate(("$g_1$", "$g_2$", "$g_3$")):
        arrow(axes, (1.55 + 3.3 * i, 2.5), (4.4 + 0.5 * i, 4.0), ORANGE)
        axes.text(2.35 + 2.3 * i + (0.35 if i == 1 else 0), 3.5, gate, fontsize=10, color=ORANGE)
    box(axes, 2.2, 4.1, 5.4, "$y_t=\\sum_i\\, g_i\\, M_i(q_t)$   gates: $u_t\\cdot$ mean keys", ORANGE)
    arrow(axes, (4.9, 4.8), (4.9, 5.4))
    box(axes, 2.9, 5.5, 4.0, "norm, output gate, o_proj", GREY)


def curves(axes: Axes) -> None:
    """Bytes per layer against the length of the text, by the sizes of what is kept."""
    lengths = [2**n for n in range(10, 21)]
    state = HEADS * HEAD_DIM * HEAD_DIM * 4
    lines = {
        "keys and values (attention)": ([2 * HEADS * HEAD_DIM * 2 * n for n in lengths], GREY, "-"),
        f"GRM, SSC: a state per {SEGMENT} tokens": ([state * (1 + n // SEGMENT) for n in lengths], BLUE, "-"),
        "logarithmic segments": ([state * (1 + (n // SEGMENT).bit_length() * 2) for n in lengths], GREEN, "-"),
        "plain recurrent model": ([state for _ in lengths], ORANGE, "--"),
    }
    for label, (values, colour, style) in lines.items():
        axes.loglog(lengths, [v / 2**20 for v in values], color=colour, ls=style, lw=2, label=label)
    axes.set(xlabel="tokens read", ylabel="MiB per layer", title="memory against length")
    axes.set_xticks([2**10, 2**14, 2**17, 2**20], ["1K", "16K", "128K", "1M"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8.5, frameon=False)
    axes.text(0.99, 0.1, f"12 heads of width {HEAD_DIM}; keys and values bf16, states fp32; counted",
              transform=axes.transAxes, ha="right", fontsize=7.5, color=GREY)  # fmt: skip


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.25, 1))
    flow(left)
    curves(right)
    figure.tight_layout()
    OUTPUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUTPUT, dpi=110)


if __name__ == "__main__":
    main()
