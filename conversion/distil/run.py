# Copyright 2026 the mc-transformers authors.
"""The stages of a distillation, one after the other; every one is skipped where an earlier call has finished it."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from ... import MCForCausalLM
from ...hub.files import new_file, new_folder, write_file
from ...hub.loading import load_tokenizer
from ...modeling_mc.mixer import MCMixer
from ..checkpoint import open_checkpoint
from .activations import Pairs, activations
from .corpus import Corpus, split_documents
from .end_to_end import PIECE, TopLogits, divergence, merged, trainable
from .loop import Training
from .options import Options
from .record import Record
from .start import errors, single_layer_costs, start_mixers
from .student import check_layers, load_teacher, make_student, new_mixer, prepare_teacher


BLOCK = 8  # batches of windows whose activations are held at the same time
FREE = ("minutes", "device", "save_seconds", "output", "work")  # what a later call may change


class Distillation:
    """A run: what lies in its folder of work, and its stages.

    Attributes:
        teacher: the model. train, held_out: the text. record: what was measured. folder: of this student; teacher,
            text and the teacher's logits lie beside it, for other students too.
    """

    def __init__(self, options: Options) -> None:
        self.options, shared = options, options.folder
        train, held_out = split_documents(options.text, options.held_out)
        self.folder = shared / Path(options.output).name
        known = {name: value for name, value in asdict(options).items() if name not in FREE}
        calls = {
            shared / "teacher.json": {"teacher": str(Path(options.teacher).resolve())},
            self.folder / "options.json": json.loads(json.dumps(known)),
        }
        for path, values in calls.items():
            self._check_same(path, values)
        self.teacher_folder = prepare_teacher(options.teacher, shared / "teacher")
        self.teacher = load_teacher(self.teacher_folder, options.device)
        every = range(options.num_auto) if isinstance(options.layers, str) else options.layers
        check_layers(every, self.teacher.config)
        self.record = Record(self.folder / "result.json")
        tokenizer, size = load_tokenizer(str(self.teacher_folder)), self.teacher.config.vocab_size
        text = {"train": train, "held_out": held_out}
        for side, paths in text.items():
            facts = Corpus.build(shared / "text" / side, paths, tokenizer, size)
            self.record.stage(f"text_{side}", lambda facts=facts: facts)
        self.train, self.held_out = (Corpus(shared / "text" / side, options.length, options.seed) for side in text)
        name = f"{options.length}-{options.seed}-{options.top_k}"
        self.logits = TopLogits(shared / f"logits-{name}", self.teacher, self.train, options)
        self.held_out_logits = TopLogits(shared / f"logits-held-out-{name}", self.teacher, self.held_out, options)
        for path, values in calls.items():  # now that all of them are known to be good
            write_file(path, json.dumps(values, indent=2) + "\n")

    @staticmethod
    def _check_same(path: Path, values: dict) -> None:
        """
        Raises:
            ValueError: an earlier call with this file had other values.
        """
        if path.exists():
            before = json.loads(path.read_text())
            if other := [name for name in values if before.get(name) != values[name]]:
                name = other[0]
                raise ValueError(
                    f"{path.parent} belongs to a call with `{name}`={before.get(name)!r}, now it is {values[name]!r}: "
                    "repeat that call, or delete the folder, or name another output and folder of work"
                )

    # ------------------------------------------------------------------------------------------------------- measuring
    @torch.no_grad()
    def measure(self, model: MCForCausalLM, name: str) -> dict:
        """Held-out loss in nats per token, of all positions and of those in the second half of a window, and KL from
        the teacher."""
        corpus, options, head = self.held_out, self.options, model.lm_head
        count = min(options.eval_windows, len(corpus.order))
        losses, kl = [], 0.0
        for number in tqdm(range(count), desc=f"held out: {name}", unit="text"):
            ids = corpus.batch([number], options.device)
            with options.autocast():
                hidden = model.model(ids, use_cache=False).last_hidden_state
                kl += divergence(head, hidden, *self.held_out_logits.batch([number])).item() / count
                pieces = zip(hidden[:, :-1].split(PIECE, 1), ids[:, 1:].split(PIECE, 1), strict=True)
                each = [F.cross_entropy(head(x).float().mT, y, reduction="none")[0] for x, y in pieces]
            losses.append(torch.cat(each).double().cpu())
        every = torch.stack(losses)
        return {
            "loss": every.mean().item(),
            "loss_second_half": every[:, every.shape[1] // 2 :].mean().item(),
            "kl": kl,
            "windows": count,
        }

    def measure_with(self, mixers: dict[int, MCMixer], name: str) -> dict:
        return self.measure(make_student(self.teacher, mixers, self.options), name)

    # ---------------------------------------------------------------------------------------------------------- stages
    def start(self) -> dict[int, MCMixer]:
        """Mixers of the converted layers as they start. Which these are is measured where that was left open."""
        options, path = self.options, self.folder / "start.safetensors"
        every = list(range(self.teacher.config.num_hidden_layers))
        layers = every if options.num_auto else list(options.layers)

        def make() -> dict:
            mixers = start_mixers(self.teacher, layers, self.train, options)
            weights = {f"{i}.{name}": x.contiguous() for i, m in mixers.items() for name, x in m.state_dict().items()}
            with new_file(path, overwrite=True) as file:
                save_file(weights, file)
            return errors(self.teacher, mixers, self.held_out, options)

        self.record.stage("start_errors", make)
        weights, mixers = load_file(path, options.device), {}
        for layer in layers:
            mixers[layer] = new_mixer(self.teacher, layer, options)
            mixers[layer].load_state_dict({name: weights[f"{layer}.{name}"] for name in mixers[layer].state_dict()})
        if options.num_auto:
            costs = self.record.stage(
                "single_layer_kl", lambda: single_layer_costs(self.teacher, mixers, self.held_out, options)
            )
            layers = sorted(sorted(layers, key=lambda layer: costs[str(layer)])[: options.num_auto])
        return {layer: mixers[layer] for layer in self.record.stage("layers", lambda: layers)}

    def _left(self, part: float) -> float | None:
        """Seconds that a training may take."""
        options = self.options
        if options.minutes is None:
            return None
        left = options.minutes * 60 - self.record.spent
        last = 1.5 * self.record.values["seconds"]["held_out_start"]  # measuring once more, and writing the model
        return max(1e-3, part * (left - last))

    def match(self, mixers: dict[int, MCMixer]) -> dict:
        """Each mixer learns its attention layer's answers to what the teacher's layer reads."""
        options = self.options
        groups = [{f"{i}.{name}": x for name, x in mixer.named_parameters()} for i, mixer in mixers.items()]
        for group in groups:
            for x in group.values():
                x.requires_grad_(True)
        seconds = self._left(options.match_share)
        path = self.folder / "match.pt"
        training = Training(path, groups, options.match_lr, options.match_steps, seconds, options.save_seconds)
        per_block, held = BLOCK * options.passes, {"block": -1, "pairs": []}

        def pairs_of(step: int) -> Pairs:
            block, place = divmod(step, per_block)
            if held["block"] != block:
                first = block * BLOCK * options.batch
                windows = range(first, first + BLOCK * options.batch)
                parts = activations(self.teacher, list(mixers), self.train, windows, options)
                held.update(block=block, pairs=list(parts))
            number, inside = divmod(place, BLOCK)
            order = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(block * options.passes + number))
            return held["pairs"][order[inside]]

        def loss_of(step: int) -> torch.Tensor:
            losses = []
            for layer, (x, y) in pairs_of(step).items():
                with options.autocast():
                    answer = mixers[layer](x, mixers[layer].table(x))
                losses.append((answer.float() - y.float()).square().sum() / y.float().square().sum())
            return torch.stack(losses).sum() / len(losses)

        done = training.run("match", loss_of)
        tokens = -(-done["steps"] // per_block) * BLOCK * options.batch * options.length
        return done | {"tokens": done["steps"] * options.batch * options.length, "different_tokens": tokens}

    def end_to_end(self, student: MCForCausalLM) -> tuple[MCForCausalLM, dict]:
        """The hybrid learns the teacher's logits; windows that matching has seen come last."""
        options = self.options
        model, parameters = trainable(student, options)
        seen = self.record.values["match"]["different_tokens"] // options.length
        seconds = self._left(1.0)
        path = self.folder / "end.pt"
        training = Training(path, [parameters], options.end_lr, options.end_steps, seconds, options.save_seconds)
        decoder = model.base_model.model if hasattr(model, "merge_and_unload") else model

        def loss_of(step: int) -> torch.Tensor:
            windows = [seen + step * options.batch + i for i in range(options.batch)]
            target = self.logits.batch(windows)
            with options.autocast():
                hidden = decoder.model(self.train.batch(windows, options.device), use_cache=False).last_hidden_state
                return divergence(decoder.lm_head, hidden, *target)

        done = training.run("end to end", loss_of)
        return merged(model).eval(), done | {"tokens": done["steps"] * options.batch * options.length}

    def run(self) -> dict:
        """All stages; writes the model and returns the record."""
        options, record = self.options, self.record
        record.stage("held_out_teacher", lambda: self.measure(self.teacher, "teacher"))
        mixers = self.start()
        record.stage("held_out_start", lambda: self.measure_with(mixers, "start"))
        matched = self.match(mixers)  # weights of a training that is over come from its state
        record.stage("match", lambda: matched)
        record.stage("match_errors", lambda: errors(self.teacher, mixers, self.held_out, options))
        record.stage("held_out_matched", lambda: self.measure_with(mixers, "matched"))
        student, trained = self.end_to_end(make_student(self.teacher, mixers, options))
        record.stage("end_to_end", lambda: trained)
        record.stage("held_out_final", lambda: self.measure(student, "final"))
        chosen = json.loads(json.dumps(asdict(options)))
        record.write(results=self._results(), options=chosen, facts=self._facts(student))
        with new_folder(options.output) as folder:
            student.save_pretrained(folder)
            open_checkpoint(self.teacher_folder).copy_extras(folder)
            write_file(folder / "distil.json", json.dumps(record.values, indent=2) + "\n")
        return record.values

    def _results(self) -> list[dict]:
        """The held-out losses as model cards read them."""
        settings = "{windows} held-out windows of " + f"{self.options.length} tokens"
        return [
            {
                "metric": metric,
                "unit": "nats per token",
                "value": found[key],
                "dataset": "held-out documents",
                "settings": settings.format(**found),
            }
            for metric, name, key in (
                ("loss", "final", "loss"),
                ("loss of the teacher", "teacher", "loss"),
                ("KL from the teacher", "final", "kl"),
            )
            for found in [self.record.values[f"held_out_{name}"]]
        ]

    def _facts(self, student: MCForCausalLM) -> dict:
        """What a reader of the record has to know."""
        return {
            "parameters": student.num_parameters(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "dtype": "bfloat16" if self.options.half else "float32",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def distil(options: Options) -> dict:
    """Turn layers of a Transformer into memory layers that do their work.

    Stages: a start in closed form; matching every layer's answers on the teacher's activations; the teacher's logits
    end to end. A call that was killed goes on where it stopped when it is repeated.

    Returns:
        the record, which `output`/distil.json holds too.

    Raises:
        FileExistsError: there is such an output. FileNotFoundError: no teacher, or no text.
        ValueError: see `Options`; another architecture; layers that do not exist; text that is not UTF-8 or too short;
            a folder of work of another call.
    """
    if Path(options.output).exists() and any(Path(options.output).iterdir()):
        raise FileExistsError(f"{options.output} exists already")
    return Distillation(options).run()
