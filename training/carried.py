# Copyright 2026 the mc-transformers authors.
"""Training on documents of any length: memories are carried from piece to piece, gradients through the last few.

A row of the batch reads one document after the other, a piece per step. What it has read stays in a cache, which is
detached: that is truncated back-propagation, and the loss of every token is the one that a pass over the whole
document gives. With `gradient_segments` larger than a piece, the pieces before are read again with their gradients.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from ..configuration_mc import LAYER_TYPE, MCConfig
from ..kernels.shared.ops import compute_dtype
from ..modeling_mc.cache import MCCache
from ..modeling_mc.model import MCModel


IGNORED = -100  # labels without a loss, as everywhere in Transformers
FOLDER = "carried-{rank}"  # of a checkpoint: what the rows of a process have read


class DocumentRows(Dataset):
    """Pieces of documents in the order in which rows of a batch read them: item i is step i // rows of row i % rows,
    so that batches of `rows` items in this order are what to train on.

    Every document is in one row, which reads it from its begin to its end; the last piece of a document is padded on
    the right. Documents are dealt out longest first, to the row that has least to read.

    Args:
        documents: a list or dataset of dicts with `input_ids` (a list or 1-D tensor of two tokens or more).
        rows: of the batch, over all processes.
        piece: tokens of a document that a row reads in a step.
        window: pieces in an item: the new one, and those before it that are read again for their gradients.
        seed: of the order of the documents in a row, another one in every epoch (`set_epoch`); None = as they were
            dealt out, the longest first.

    An item is a dict of `input_ids` and `attention_mask` `[window, piece]`, `begins` `[window]` bool (a document
    begins with this piece) and `labels` `[piece + 1]`: -100, then the token after each of the new piece, or -100.

    Raises:
        ValueError: no documents, one of fewer than two tokens, or a number below 1.
    """

    def __init__(
        self, documents: Sequence[dict], rows: int, piece: int, window: int = 1, seed: int | None = None
    ) -> None:
        for name, value in (("rows", rows), ("piece", piece), ("window", window)):
            if value < 1:
                raise ValueError(f"DocumentRows: `{name}`={value} is not valid, allowed: an integer >= 1")
        lengths = [len(document["input_ids"]) for document in documents]
        if min(lengths, default=0) < 2:
            raise ValueError(
                f"DocumentRows: `documents` needs one or more of two tokens or more, got lengths {lengths[:5]}"
            )
        self.documents, self.rows, self.piece, self.window, self.seed = documents, rows, piece, window, seed
        self._dealt: list[list[int]] = [[] for _ in range(rows)]
        self._pieces = [-(-(length - 1) // piece) for length in lengths]  # the last token is only a label
        loads = [0] * rows
        for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = loads.index(min(loads))
            self._dealt[row].append(number)
            loads[row] += self._pieces[number]
        self.steps = max(loads)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Another order of the documents in every row, known from seed and epoch."""
        self._plan: list[list[tuple[int, int]]] = []  # per row and step: document, and which piece of it
        self._read: dict[int, tuple[int, torch.Tensor]] = {}  # the document that a row reads
        for row, numbers in enumerate(self._dealt):
            if self.seed is not None:
                numbers = random.Random(f"{self.seed} {epoch} {row}").sample(numbers, len(numbers))
            self._plan.append([(number, part) for number in numbers for part in range(self._pieces[number])])

    def __len__(self) -> int:
        return self.steps * self.rows

    def _document(self, row: int, number: int) -> torch.Tensor:
        if self._read.get(row, (None,))[0] != number:
            self._read[row] = number, torch.as_tensor(self.documents[number]["input_ids"], dtype=torch.int64)
        return self._read[row][1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, row = divmod(index, self.rows)
        ids, mask = torch.zeros(2, self.window, self.piece, dtype=torch.int64)
        begins = torch.zeros(self.window, dtype=torch.bool)
        labels = torch.full((self.piece + 1,), IGNORED)
        for place in range(self.window):
            at = step - self.window + 1 + place
            if not 0 <= at < len(self._plan[row]):
                continue
            number, part = self._plan[row][at]
            start, document = part * self.piece, self._document(row, number)
            real = document[start : min(start + self.piece, len(document) - 1)]
            ids[place, : len(real)], mask[place, : len(real)] = real, 1
            begins[place] = part == 0
            if place == self.window - 1:
                labels[1 : len(real) + 1] = document[start + 1 : start + len(real) + 1]
        return {"input_ids": ids, "attention_mask": mask, "begins": begins, "labels": labels}


class Carried:
    """What the rows of a batch have read, from step to step.

    Attributes:
        cache: the memory before the window of the next step, or None before the first.
    """

    def __init__(self, config: MCConfig, cache: MCCache | None = None) -> None:
        self.config, self.cache = config, cache

    def read(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits `[B, piece, vocab]` of the new pieces of a batch of `DocumentRows`, as `model`, maybe wrapped, gives
        them; gradients pass all pieces of the window."""
        cache = MCCache(self.config) if self.cache is None else self.cache
        last = batch["input_ids"].shape[1] - 1
        for place, (ids, mask, begins) in enumerate(
            zip(*(batch[name].unbind(1) for name in ("input_ids", "attention_mask", "begins")), strict=True)
        ):
            cache.begin_rows(begins, model)
            logits = model(ids, attention_mask=mask, cache=cache, logits_to_keep=int(place < last)).logits
            if place == 0:
                self.cache = cache.detached()
        return logits


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over tokens of the loss of logits `[B, piece, vocab]`; `labels` `[B, piece + 1]` of `DocumentRows`."""
    targets = labels[:, 1:].flatten()
    logits = logits.to(compute_dtype(logits)).flatten(0, 1)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


class CarriedTrainer(Trainer):
    """A Trainer for documents longer than memory allows: it trains on pieces and carries the memory on.

    Every token is predicted from all of its document before it, as far as the model remembers, and its loss is the one
    that a pass over the whole document gives. Gradients flow through the last `gradient_segments` segments. A
    checkpoint holds what every row has read, in `carried-RANK`, so that training resumes in the middle of documents.

    Args:
        model: an `MCForCausalLM` of memory layers only, or one that PEFT adapts.
        args: `per_device_train_batch_size` is the number of documents that are read side by side.
        train_dataset: documents: dicts with `input_ids` of any length.
        eval_dataset: the same; `evaluate` gives the mean loss of all tokens.
        piece_segments: segments that a row reads in a step.
        gradient_segments: segments through which gradients flow, those of the step included; a multiple of
            `piece_segments`. None = the step's own. Pieces before these are read again: n pieces cost n times.
        kwargs: of `Trainer`; there is no data collator.

    Raises:
        ValueError: layers of attention, `gradient_checkpointing`, several GPUs in one process, a `gradient_segments`
            that is no multiple, or what `DocumentRows` refuses; when it resumes, a checkpoint without `carried-RANK`.

    Example:
        >>> import transformers
        >>> from mc_transformers.training import CarriedTrainer
        >>> config = MCConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     segment_size=16)
        >>> args = transformers.TrainingArguments("outputs", max_steps=2, report_to="none", save_strategy="no",
        ...     per_device_train_batch_size=1, disable_tqdm=True, logging_strategy="no")
        >>> documents = [{"input_ids": torch.randint(64, (1000,))}]
        >>> trainer = CarriedTrainer(MCForCausalLM(config), args, train_dataset=documents, piece_segments=4)
        >>> trainer.remove_callback(transformers.PrinterCallback)
        >>> trainer.train().global_step, trainer.carried.cache.get_seq_length()
        (2, 128)
    """

    def __init__(
        self, model=None, args=None, *, piece_segments: int = 1, gradient_segments: int | None = None, **kwargs
    ) -> None:
        super().__init__(model, args, **kwargs)
        config = self.model.config
        gradient_segments = piece_segments if gradient_segments is None else gradient_segments
        if piece_segments < 1 or gradient_segments < piece_segments or gradient_segments % piece_segments:
            raise ValueError(
                f"CarriedTrainer: `gradient_segments`={gradient_segments} is not valid with `piece_segments`="
                f"{piece_segments}, allowed: a multiple of it, and it from 1 on"
            )
        if set(config.layer_types) != {LAYER_TYPE}:
            raise ValueError(
                f"CarriedTrainer: `layer_types`={config.layer_types} are not valid, allowed: {LAYER_TYPE!r} only, as "
                "rows begin new documents at different steps"
            )
        if self.args.gradient_checkpointing or self.args.n_gpu > 1:
            raise ValueError(
                "CarriedTrainer: `gradient_checkpointing` and several GPUs in one process are not possible, as both "
                "run forwards that fill no cache: take shorter pieces, and a process per GPU (torchrun)"
            )
        self.piece, self.window = piece_segments * config.segment_size, gradient_segments // piece_segments
        self.carried = Carried(config)
        self._resumed_from: Path | None = None
        self.add_callback(_SaveCarried(self))

    @property
    def decoder(self) -> MCModel:
        """The model without head and wrappers."""
        return next(module for module in self.model.modules() if isinstance(module, MCModel))

    def _rows(self, documents: Sequence[dict], batch_size: int, window: int, seed: int | None) -> DataLoader:
        rows = DocumentRows(documents, batch_size * self.accelerator.num_processes, self.piece, window, seed)
        # batches go to the processes in turn, so that each gets its own rows
        return self.accelerator.prepare(DataLoader(rows, batch_size))

    def get_train_dataloader(self) -> DataLoader:
        """Pieces of the documents, row by row in their order."""
        if self.train_dataset is None:
            raise ValueError("CarriedTrainer: training requires a `train_dataset`")
        return self._rows(self.train_dataset, self._train_batch_size, self.window, self.args.seed)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """`Trainer.train`, which see; what rows have read comes from the checkpoint, too.

        Raises:
            FileNotFoundError: the checkpoint does not say what rows have read.
        """
        self.carried, self._resumed_from = Carried(self.model.config), None
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            folder = get_last_checkpoint(self.args.output_dir) if folder is True else folder
            if folder is not None:
                self._resumed_from = Path(folder) / FOLDER.format(rank=self.args.process_index)
                if not self._resumed_from.is_dir():
                    raise FileNotFoundError(f"`resume_from_checkpoint`: {self._resumed_from} is missing")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The mean loss of the new pieces' tokens, or their sum / `num_items_in_batch`; `inputs` of `DocumentRows`."""
        if self._resumed_from is not None:  # the weights, which the memory belongs to, are there by now
            self.carried.cache, self._resumed_from = MCCache.from_pretrained(self._resumed_from, self.decoder), None
        logits = self.carried.read(model, inputs)
        loss = summed_loss(logits, inputs["labels"], self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != IGNORED).sum().clamp(min=1)
        elif self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        loss = loss / num_items_in_batch
        return (loss, {"logits": logits}) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Sequence[dict] | None = None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss of all tokens of documents, each read as a whole.

        Returns:
            `eval_loss`, which is logged, too.
        """
        documents = self.eval_dataset if eval_dataset is None else eval_dataset
        model, was_training, carried = self.model, self.model.training, Carried(self.model.config)
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self._rows(documents, self.args.eval_batch_size, 1, None):
            with self.compute_loss_context_manager():
                loss = summed_loss(carried.read(model, batch), batch["labels"])
            total += torch.stack([loss.double(), (batch["labels"] != IGNORED).sum()])
        model.train(was_training)
        total = self.accelerator.reduce(total, "sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _SaveCarried(TrainerCallback):
    """Puts what rows have read into every checkpoint."""

    def __init__(self, trainer: CarriedTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER.format(rank=args.process_index)
        if (cache := self.trainer.carried.cache) is not None and folder.parent.is_dir():
            cache.save_pretrained(folder, self.trainer.decoder)
