# Copyright 2026 the mc-transformers authors.
"""Train dense, then sparse: the number of segments that `ssc` reads falls during training."""

import math

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling_mc.mixer import Mixer


class ReadSchedule(TrainerCallback):
    """Lowers k of a model with aggregation="ssc" from all finished segments to `num_selected_segments`.

    k(t) = ceil(N (k / N)^min(1, t / T0)), with N finished segments at the longest, of which all are read at first, so
    that training begins as "grm". Routes that choose few segments from the start may never begin to learn.

    Args:
        num_segments: N, finished segments of a training text: its tokens / segment_size.
        part: T0 as a part of all steps, in (0, 1]; 10 to 30 percent are usual.

    The config keeps the last k, so checkpoints are saved with it. Evaluation during training uses the k of the step.

    Raises:
        ValueError: a number out of range; at the begin of training, a model whose aggregation is not "ssc".

    Example:
        >>> from mc_transformers.training import ReadSchedule
        >>> ReadSchedule(num_segments=16).selected(step=0, steps=100, final=4)
        16
    """

    def __init__(self, num_segments: int, part: float = 0.3) -> None:
        if num_segments < 1:
            raise ValueError(f"ReadSchedule: `num_segments`={num_segments} is not valid, allowed: an integer >= 1")
        if not 0 < part <= 1:
            raise ValueError(f"ReadSchedule: `part`={part} is not valid, allowed: a number in (0, 1]")
        self.num_segments, self.part = num_segments, part

    def selected(self, step: int, steps: int, final: int) -> int:
        """k at `step` of `steps`, for a training that ends with `final`."""
        if final >= self.num_segments:
            return final
        progress = min(1.0, step / max(1.0, self.part * steps))
        return math.ceil(self.num_segments * (final / self.num_segments) ** progress - 1e-9)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._mixers(kwargs["model"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for mixer in self._mixers(kwargs["model"]):
            mixer.aggregation.top_k = self.selected(
                state.global_step, state.max_steps, mixer.config.num_selected_segments
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for mixer in self._mixers(kwargs["model"]):
            mixer.aggregation.top_k = mixer.config.num_selected_segments

    @staticmethod
    def _mixers(model: nn.Module) -> list[Mixer]:
        """The memory layers, whatever wraps the model (accelerate, torch.compile, PEFT).

        Raises:
            ValueError: none, or of another read rule.
        """
        mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        wrong = {mixer.config.aggregation for mixer in mixers} - {"ssc"}
        if wrong or not mixers:
            found = f"`aggregation`={wrong.pop()!r}" if wrong else "a model without memory layers"
            raise ValueError(f"ReadSchedule: {found} is not valid, allowed: 'ssc'")
        return mixers
