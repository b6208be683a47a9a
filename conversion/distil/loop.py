# Copyright 2026 the mc-transformers authors.
"""A training that may be killed: it ends by steps or by seconds, and goes on from its last state on disk."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ...hub.files import new_file


WARMUP = 0.05  # part of a training in which the learning rate rises
FIRST = 1e-3  # part that the first step counts as, so that it moves something
SHARE = 20  # at least this many times as long as a state takes to write lies between two of them
LEAST_CURVE = 200  # losses that the record shows, about


class Training:
    """AdamW over named parameters, with a cosine schedule by what is over of its steps or seconds.

    Args:
        path: file of its state. groups: parameters whose gradient is clipped together, by name.
        lr: peak learning rate. steps, seconds: either ends it; None = does not.
        save_seconds: between two states; a state that takes long is written less often.

    Where there is a state already its seconds count, not `seconds`. A call that goes on after a kill repeats the steps
    since the last state. With `steps` alone the weights are then those of a run without a kill; with `seconds` the
    schedule depends on the speed of the machine.
    """

    def __init__(
        self,
        path: Path,
        groups: Iterable[dict[str, nn.Parameter]],
        lr: float,
        steps: int | None,
        seconds: float | None,
        save_seconds: float,
    ) -> None:
        self.path, self.groups, self.lr, self.save_seconds = path, list(groups), lr, save_seconds
        self.steps, self.limit = steps, seconds
        self.parameters = {name: x for group in self.groups for name, x in group.items()}
        self.optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=lr, weight_decay=0.01)
        self.step, self.seconds, self.cpu_seconds, self.curve = 0, 0.0, 0.0, []
        if path.exists():
            self._load()

    @property
    def part(self) -> float:
        """What is over of it, from 0 to 1."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.seconds / self.limit if self.limit else 0.0
        return min(1.0, max(by_steps, by_time))

    def _rate(self) -> float:
        part = max(self.part, FIRST)
        return self.lr * min(1.0, part / WARMUP) * 0.5 * (1 + math.cos(math.pi * part))

    def run(self, name: str, loss_of: Callable[[int], torch.Tensor]) -> dict:
        """Minimise `loss_of(step)`, which is called once per step, in order; returns what the record shows."""
        saved = time.perf_counter()
        with self._bar(name) as bar:
            while self.part < 1:
                start, cpu = time.perf_counter(), time.process_time()
                for group in self.optimizer.param_groups:
                    group["lr"] = self._rate()
                loss = loss_of(self.step)
                loss.backward()
                for group in self.groups:
                    nn.utils.clip_grad_norm_(group.values(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.curve.append(loss.item())
                if not math.isfinite(self.curve[-1]):
                    raise ValueError(f"{name}: the loss is {self.curve[-1]} in step {self.step}: lower its rate")
                self.step += 1
                self.seconds += time.perf_counter() - start
                self.cpu_seconds += time.process_time() - cpu
                self._show(bar)
                if time.perf_counter() - saved > self.save_seconds:
                    begin = time.perf_counter()
                    self.save()
                    saved = time.perf_counter()
                    self.save_seconds = max(self.save_seconds, SHARE * (saved - begin))
        self.save()
        every = max(1, len(self.curve) // LEAST_CURVE)
        parts = [self.curve[i : i + every] for i in range(0, len(self.curve), every)]
        spent = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {
            "steps": self.step,
            **spent,
            "losses": [sum(part) / len(part) for part in parts],
            "steps_per_loss": every,
        }

    def _bar(self, name: str) -> tqdm:
        by_steps = self.limit is None
        bar = tqdm(desc=name, total=self.steps if by_steps else round(self.limit), unit="step" if by_steps else "s")
        self._show(bar)
        bar.initial = bar.n
        return bar

    def _show(self, bar: tqdm) -> None:
        done = self.step if self.limit is None else min(bar.total, round(self.part * bar.total))
        bar.update(done - bar.n)
        if self.curve:
            bar.set_postfix(step=self.step, loss=f"{self.curve[-1]:.4f}", refresh=False)

    def save(self) -> None:
        """Write the state under a temporary name, then rename it."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "limit": self.limit,
            "curve": self.curve,
            "parameters": {name: x.detach() for name, x in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        with new_file(self.path, overwrite=True) as file:
            torch.save(state, file)

    @torch.no_grad()
    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, x in self.parameters.items():
            x.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "cpu_seconds", "limit", "curve"):
            setattr(self, name, state[name])
