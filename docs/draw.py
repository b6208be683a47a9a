"""Draws the pictures of README.md and docs/ into docs/images. Curves are formulas; nothing in them is measured,
but in the picture of gates, which a shipped checkpoint makes.

Run: python docs/draw.py
"""

from pathlib import Path

import matplotlib
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402


FOLDER = Path(__file__).parent / "images"
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
    axes.text(
        0.99,
        0.1,
        f"12 heads of width {HEAD_DIM}; keys and values bf16, states fp32; counted",
        transform=axes.transAxes,
        ha="right",
        fontsize=7.5,
        color=GREY,
    )


def overview() -> plt.Figure:
    """The way of a token, and memory against length."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.25, 1))
    flow(left)
    curves(right)
    return figure


def fenwick(finished: int) -> list[tuple[int, int]]:
    """(first segment, length) of the memories that stand for `finished` segments in logarithmic segmentation."""
    found, first = [], 0
    for level in reversed(range(finished.bit_length())):
        if finished >> level & 1:
            found.append((first, 1 << level))
            first += 1 << level
    return found


def reads() -> plt.Figure:
    """Which memories a token reads, by the segment that it stands in."""
    segments, chosen = (
        12,
        {
            1: (0,),
            2: (0, 1),
            3: (0, 2),
            4: (1, 3),
            5: (1, 2),
            6: (0, 5),
            7: (2, 6),
            8: (1, 7),
            9: (4, 6),
            10: (0, 8),
            11: (3, 9),
        },
    )
    kept = {
        "none": lambda now: [],
        "grm, residual, soup, mean": lambda now: [(i, 1, BLUE) for i in range(now)],
        "ssc, k = 2": lambda now: [(i, 1, BLUE if i in chosen.get(now, ()) else "#d5dde6") for i in range(now)],
        "grm, logarithmic": lambda now: [(*bar, BLUE) for bar in fenwick(now)],
    }
    figure, panels = plt.subplots(1, 4, figsize=(11, 3.1), sharey=True)
    for axes, (title, memories) in zip(panels, kept.items(), strict=True):
        for now in range(segments):
            online = (0, now + 1) if title == "none" else (now, 1)
            for first, length, colour in [*memories(now), (*online, GREEN)]:
                axes.barh(now, length - 0.14, 0.8, left=first + 0.07, color=colour)
        axes.set(xlim=(0, segments), xlabel="segment that was written", title=title)
        axes.set_xticks([0.5, 3.5, 7.5, 11.5], ["1", "4", "8", "12"])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    panels[0].invert_yaxis()
    panels[0].set_yticks([0, 3, 7, 11], ["1", "4", "8", "12"])
    panels[0].set_ylabel("segment of the reading token")
    names = {GREEN: "online memory", BLUE: "memory of finished segments, read", "#d5dde6": "kept, not read"}
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in names]
    figure.legend(patches, names.values(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def cost() -> plt.Figure:
    """Multiply-adds of reading and writing per token and head, by the formulas of docs/choosing.md."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
    lengths = [2**n for n in range(9, 21)]
    d, own = HEAD_DIM, 2 * HEAD_DIM**2
    lines = {
        "attention": ([2 * d * n for n in lengths], GREY, "-"),
        "dla, grm": ([28 * d * d + 8 * d * d * (n // SEGMENT) for n in lengths], BLUE, ":"),
        "linear, grm": ([own + d * d * (n // SEGMENT) for n in lengths], BLUE, "-"),
        "linear, ssc, k = 4": (
            [own + d * (n // SEGMENT) + d * d * min(4, n // SEGMENT) for n in lengths],
            ORANGE,
            "-",
        ),
        "linear, none": ([own for _ in lengths], ORANGE, "--"),
    }
    for label, (values, colour, style) in lines.items():
        left.loglog(lengths, values, color=colour, ls=style, lw=2, label=label)
    left.set(
        xlabel="position of the token",
        ylabel="multiply-adds per head",
        title=f"cost of a token, d = {d}, C = {SEGMENT}",
    )
    left.set_xticks([2**10, 2**14, 2**17, 2**20], ["1K", "16K", "128K", "1M"])
    sizes = [2**n for n in range(4, 12)]
    for label, products, style in (("linear", 1, "-"), ("dla, titans", 8, ":")):
        right.loglog(sizes, [products * d / (2 * size) for size in sizes], color=BLUE, ls=style, lw=2, label=label)
    right.axhline(1, color=GREY, lw=2, label="attention")
    right.set(xlabel="segment size C", ylabel="cost of reading / attention's", title=f"far into a text, grm, d = {d}")
    right.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1024"])
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8.5, frameon=False)
    return figure


def gates() -> plt.Figure:
    """What the shipped recall checkpoint reads; concepts.md shows this code."""
    import mc_transformers as mc

    torch.manual_seed(0)
    keys, values = torch.randperm(63)[:16] + 1, torch.randperm(64)[:16] + 64
    asked = torch.stack([keys[torch.randperm(16)], torch.randint(64, 128, (16,))], 1)
    ids = torch.cat([torch.stack([keys, values], 1), asked]).view(1, 64)
    model = mc.MCForCausalLM.from_pretrained(Path(__file__).parents[1] / "model_cards" / "checkpoints" / "recall")
    return mc.plot_gates(mc.read_gates(model, ids)[0])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for draw in (overview, reads, cost, gates):
        figure = draw()
        figure.set_layout_engine("constrained" if draw in (reads, gates) else "tight")
        figure.savefig(FOLDER / f"{draw.__name__}.png", dpi=110 if draw is overview else 100)


if __name__ == "__main__":
    main()
