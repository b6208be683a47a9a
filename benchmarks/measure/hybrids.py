# Copyright 2026 the mc-transformers authors.
"""What a distilled hybrid keeps of its teacher, and what it costs: four measurements, each resumable.

    python -m benchmarks.measure.hybrids loss --text BOOK.txt --models teacher=FOLDER grm=FOLDER --windows 3
    python -m benchmarks.measure.hybrids recall --text BOOK.txt --models teacher=FOLDER grm=FOLDER --lengths 1024 4096
    python -m benchmarks.measure.hybrids cost --models teacher=FOLDER grm=FOLDER --lengths 1024 4096 8192
    python -m benchmarks.measure.hybrids records --models grm=FOLDER

`NAME=FOLDER` is a model; `NAME=FOLDER@256:9,19,29` the same with layers 9, 19 and 29 attending to 256 tokens only,
without any training: what a memory has to be better than. Every window, trial and round is written as soon as it is
measured, and is not measured again by a later call.

    loss      nats per token by position, window by window of the text
    recall    facts in the text, asked for through the chat template; greedy answers
    cost      bytes of the cache, and the time of a decoded token; all models take turns in every round
    records   nothing new: what the distillation has written into FOLDER/distil.json, stage by stage
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.measure.cpu import machine
from benchmarks.tasks.facts_in_text import make_trial
from mc_transformers import MCCache, MCConfig, MCForCausalLM
from mc_transformers.cli.evaluate import position_losses, position_ranges
from mc_transformers.hub.files import write_file


DECODED = 8  # tokens per round of `cost`, and at most per answer of `recall`
RESULTS = Path(__file__).resolve().parents[1] / "results" / "hybrids.json"


class Results:
    """A JSON file: kind, then model, then what was measured, by a key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = json.loads(path.read_text()) if path.exists() else {}

    def of(self, kind: str, model: str) -> dict:
        return self.values.setdefault(kind, {}).setdefault(model, {})

    def add(self, kind: str, model: str, key: str, value: object) -> None:
        self.of(kind, model)[key] = value
        write_file(self.path, json.dumps(self.values, indent=1) + "\n")


def load(place: str) -> MCForCausalLM:
    """A model, see the head of this file.

    Raises:
        ValueError: layers behind an @ that are no attention layers.
    """
    folder, _, window = place.partition("@")
    config = MCConfig.from_pretrained(folder)
    if window:
        width, _, layers = window.partition(":")
        kinds = list(config.layer_types)
        for layer in map(int, layers.split(",")):
            if kinds[layer] != "full_attention":
                raise ValueError(f"{place}: layer {layer} is {kinds[layer]!r}, allowed: full_attention")
            kinds[layer] = "sliding_attention"
        config = MCConfig.from_dict(config.to_dict() | {"layer_types": kinds, "sliding_window": int(width)})
    return MCForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def measure_loss(models: dict[str, str], results: Results, args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(next(iter(models.values())).partition("@")[0])
    text = Path(args.text).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // args.length * args.length].view(-1, args.length)[: args.windows]
    for number in range(len(windows)):
        for name, place in models.items():
            key = f"{Path(args.text).stem}, {args.length}, {number}"
            if key in results.of("loss", name):
                continue
            losses = position_losses(load(place), windows[number : number + 1])
            ranges = {f"{a}-{b - 1}": losses[a - 1 : b - 1].mean().item() for a, b in position_ranges(args.length)}
            results.add("loss", name, key, ranges | {"all": losses.mean().item()})


@torch.inference_mode()
def measure_recall(models: dict[str, str], results: Results, args: argparse.Namespace) -> None:
    text = Path(args.text).read_text(encoding="utf-8")
    for name, place in models.items():
        model, tokenizer = load(place), AutoTokenizer.from_pretrained(place.partition("@")[0])
        cases = [(length, keys, seed) for length in args.lengths for keys in args.keys for seed in range(args.trials)]
        for length, keys, seed in tqdm(cases, desc=name, unit="trial"):
            key = f"{Path(args.text).stem}, {length}, {keys} keys, {seed}"
            if key in results.of("recall", name):
                continue
            trial = make_trial(tokenizer, text, length, keys, seed)
            ids = torch.tensor([trial.ids])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=DECODED, do_sample=False)
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            results.add("recall", name, key, {"right": trial.answer in answer, "answer": answer})


@torch.inference_mode()
def measure_cost(models: dict[str, str], results: Results, args: argparse.Namespace) -> None:
    loaded = {name: load(place) for name, place in models.items()}
    for length in args.lengths:
        if all(f"{length}" in results.of("cost", name) for name in models):
            continue
        caches, times = {}, {name: [] for name in loaded}
        for name, model in tqdm(loaded.items(), desc=f"read {length} tokens"):
            caches[name] = MCCache(model.config)
            ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
            for piece in ids.split(1024, 1):
                model.model(input_ids=piece, cache=caches[name])
        size = {name: cache.nbytes for name, cache in caches.items()}
        token = torch.zeros(1, 1, dtype=torch.long)
        for _ in tqdm(range(args.rounds + 1), desc="decode"):
            for name, model in loaded.items():
                start = time.perf_counter()
                for _ in range(DECODED):
                    model(input_ids=token, cache=caches[name])
                times[name].append((time.perf_counter() - start) / DECODED)
        for name in models:
            value = {"cache_bytes": size[name], "ms_per_token": 1000 * statistics.median(times[name][1:])}
            results.add("cost", name, f"{length}", value)


def copy_records(models: dict[str, str], results: Results, args: argparse.Namespace) -> None:
    for name, folder in models.items():
        record = json.loads((Path(folder) / "distil.json").read_text())
        options = record["options"]
        kept = {key: options[key] for key in ("memory", "aggregation", "seed", "length", "batch", "trained")}
        kept |= {"layers": record["layers"], "parameters": record["facts"]["parameters"]}
        for stage in ("teacher", "start", "matched", "final"):
            kept[stage] = record[f"held_out_{stage}"]
        for stage in ("match", "end_to_end"):
            kept[stage] = {key: record[stage][key] for key in ("steps", "tokens")}
        results.add("records", name, "distil", kept | {"cpu_seconds": record["cpu_seconds"]})


MEASURES = {"loss": measure_loss, "recall": measure_recall, "cost": measure_cost, "records": copy_records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--text", help="a file of UTF-8 text, for loss and recall")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window of `loss` (%(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="of `loss` (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="of recall and cost")
    parser.add_argument("--keys", type=int, nargs="+", default=[1, 4], help="facts in a text of recall")
    parser.add_argument("--trials", type=int, default=10, help="of recall, per length and keys (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of cost (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.what in ("loss", "recall") and not args.text:
        parser.error(f"{args.what} needs --text")
    torch.set_num_threads(args.threads)
    models, results = dict(model.split("=", 1) for model in args.models), Results(args.output)
    MEASURES[args.what](models, results, args)
    results.add("machine", args.what, "last run", machine(args.threads))


if __name__ == "__main__":
    main()
