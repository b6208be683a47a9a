# Copyright 2026 the mc-transformers authors.
"""The hybrid learns the teacher's logits, of which the largest are kept on disk, so that the teacher runs once."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ... import MC_LORA_TARGETS, MCForCausalLM
from ...hub.files import new_file
from .corpus import Corpus
from .options import Options


PIECE = 512  # positions whose logits exist at the same time
FILE_WINDOWS = 8  # windows in a file of the teacher's logits
TINY = 1e-6  # least probability of all tokens that were not kept


def top_logits(head: nn.Module, hidden: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` likeliest tokens `[B, T, k]` of hidden states `[B, T, hidden]`, and their log-probabilities."""
    ids, logs = [], []
    for piece in hidden.split(PIECE, 1):
        found = F.log_softmax(head(piece).float(), -1).topk(min(top_k, head.weight.shape[0]), -1)
        ids.append(found.indices)
        logs.append(found.values)
    return torch.cat(ids, 1), torch.cat(logs, 1)


def _piece_divergence(head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    ours = F.log_softmax(head(hidden).float(), -1).gather(-1, ids)
    rest, our_rest = (torch.log((1 - x.exp().sum(-1)).clamp_min(TINY)) for x in (logs, ours))
    return (logs.exp() * (logs - ours)).sum() + (rest.exp() * (rest - our_rest)).sum()


def divergence(head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher, student) in nats per token.

    Args:
        hidden: the student's last hidden states `[B, T, hidden]`. ids, logs: of `top_logits` of the teacher. All other
            tokens count as one.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for piece, some_ids, some_logs in zip(*(x.split(PIECE, 1) for x in (hidden, ids, logs)), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_piece_divergence, head, piece, some_ids, some_logs, use_reentrant=False)
        else:
            total = total + _piece_divergence(head, piece, some_ids, some_logs)
    return total / ids[..., 0].numel()


class TopLogits:
    """The teacher's largest logits of every window of a corpus, made when they are first asked for.

    A file holds those of 8 windows that follow each other in the corpus's order: `[8, T, k]` token numbers (16 bits
    where the vocabulary allows) and log-probabilities (fp16), so 64 of them take 256 bytes per token.
    """

    def __init__(self, folder: Path, teacher: MCForCausalLM, corpus: Corpus, options: Options) -> None:
        self.folder, self.teacher, self.corpus, self.options = folder, teacher, corpus, options
        self.small = teacher.config.vocab_size <= 1 << 16
        self.number, self.held = -1, {}
        folder.mkdir(parents=True, exist_ok=True)

    def window(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers `[T, k]`, int64, and log-probabilities, fp32, of window `number`."""
        number %= len(self.corpus.order)
        if number // FILE_WINDOWS != self.number:
            self.number = number // FILE_WINDOWS
            path = self.folder / f"{self.number:06d}.safetensors"
            if not path.exists():
                self._make(path)
            self.held = load_file(path)
        place = number % FILE_WINDOWS
        ids = self.held["ids"][place]
        return (ids.view(torch.uint16) if self.small else ids).long(), self.held["logs"][place].float()

    def batch(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of several windows, `[B, T, k]`, on the device of the run."""
        ids, logs = zip(*map(self.window, numbers), strict=True)
        return torch.stack(ids).to(self.options.device), torch.stack(logs).to(self.options.device)

    @torch.no_grad()
    def _make(self, path: Path) -> None:
        first = self.number * FILE_WINDOWS
        found = []
        for number in range(first, min(first + FILE_WINDOWS, len(self.corpus.order))):
            with self.options.autocast():
                hidden = self.teacher.model(
                    self.corpus.batch([number], self.options.device), use_cache=False
                ).last_hidden_state
                found.append(top_logits(self.teacher.lm_head, hidden, self.options.top_k))
        ids, logs = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        ids = ids.to(torch.int32) if not self.small else ids.to(torch.uint16).view(torch.int16)
        with new_file(path, overwrite=True) as file:
            save_file({"ids": ids.contiguous(), "logs": logs.half().contiguous()}, file)


def trainable(student: MCForCausalLM, options: Options) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model to run (wrapped where adapters are trained) and its parameters to train, by name.

    Raises:
        ImportError: PEFT is missing, which "lora" needs.
    """
    model: nn.Module = student
    if options.trained == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("trained='lora' needs the package peft: pip install 'mc-transformers[train]'") from error
        targets = [
            name
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear) and ".mixer." not in name and name.rpartition(".")[2] in MC_LORA_TARGETS
        ]
        torch.manual_seed(options.seed)
        rank = options.lora_rank
        model = get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    chosen = {
        name: x
        for name, x in model.named_parameters()
        if options.trained == "all" or ".mixer." in name or ".lora_" in name
    }
    model.requires_grad_(False)
    for x in chosen.values():
        x.requires_grad_(True)
    return model, chosen


def merged(model: nn.Module) -> MCForCausalLM:
    """The student of `trainable`, with adapters added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
