"""Ids, masks, batches, errors, interruptions and threads on one cache; long texts; the code of a bundle."""

import copy
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from checkpoints import Checkpoint, argv
from harness import Bad, Case, Cases, accepted, expect, raises
from test_transactions import GREEDY, KINDS, Planted, break_at, generate_interrupted, make

from helpers import build, relative_error, small_config, tokens
from mc_transformers import MCCache


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> str:
    expect(relative_error(found, expected) < tolerance, "silent", "other answers")
    return "right"


def ids() -> Cases:
    def case(change, words, kinds=(ValueError, IndexError)) -> Case:
        def work(place: Path) -> str:
            model, cache = make("grm"), MCCache(config=make("grm").config)
            with torch.no_grad():
                model(tokens(2, 20), cache=cache)
                result = raises(lambda: model(change(tokens(2, 9)), cache=cache), words, kinds)
                try:
                    found = model(tokens(2, 9), cache=cache).logits
                except ValueError as error:
                    expect("broken" in str(error), "unclear", error)
                    return result
                whole = model(torch.cat([tokens(2, 20), tokens(2, 9)], 1)).logits
            close(found, whole[:, 20:])
            return result

        return work

    def labels(change, words) -> Case:
        def work(place: Path) -> str:
            model = make("grm")
            return raises(
                lambda: model(tokens(2, 9), labels=change(tokens(2, 9))), words, (ValueError, IndexError, RuntimeError)
            )

        return work

    def ignored(place: Path) -> str:
        loss = make("grm")(tokens(2, 9), labels=torch.full((2, 9), -100)).loss
        expect(bool(loss.isnan()) or float(loss) == 0, "silent", loss)  # torch's mean of nothing
        return "right"

    return {
        "beyond the vocabulary": case(lambda x: x + 100, ["range", "vocab"]),
        "negative": case(lambda x: x - 100, ["range", "vocab"]),
        "fp32": case(lambda x: x.float(), ["input_ids"]),
        "bool": case(lambda x: x > 3, ["input_ids"]),
        "one dimension": case(lambda x: x[0], ["input_ids"]),
        "three dimensions": case(lambda x: x[None], ["input_ids"]),
        "another number of rows": case(lambda x: x[:1], ["rows", "row"]),
        "no tokens": case(lambda x: x[:, :0], ["input_ids", "token"]),
        "labels beyond": labels(lambda x: x + 100, ["range", "bounds", "label", "Target"]),
        "labels of another length": labels(lambda x: x[:, :5], ["label", "batch_size", "size"]),
        "labels of another dtype": labels(lambda x: x.bool(), ["label", "dtype", "type", "expected", "Bool"]),
        "all labels ignored": ignored,
    }


def masks() -> Cases:
    def refused(value: float) -> Case:
        def work(place: Path) -> str:
            model, mask = make("grm"), torch.ones(2, 12)
            mask[1, 2] = value
            return raises(lambda: model(tokens(2, 12), attention_mask=mask), ["`attention_mask`"])

        return work

    def shape(*size: int) -> Case:
        return lambda place: raises(
            lambda: make("grm")(tokens(2, 12), attention_mask=torch.ones(*size)), ["attention_mask", "shape"]
        )

    @torch.no_grad()
    def padded(place: Path, where: slice = slice(0, 4), dtype=torch.long) -> str:
        model, mask = make("grm"), torch.ones(2, 12, dtype=dtype)
        mask[0, where] = 0
        kept = mask[0].bool()
        found = model(tokens(2, 12), attention_mask=mask).logits[0, kept]
        return close(found, model(tokens(2, 12)[:1, kept]).logits[0])

    values = (float("nan"), float("-inf"), float("inf"), torch.finfo(torch.float32).min, 0.5, 2.0, -1.0)
    cases = {f"a value {value}": refused(value) for value in values}
    cases |= {f"shape {size}": shape(*size) for size in ((2, 11), (1, 12), (2, 12, 1))}
    cases |= {"padding on the left": padded, "in the middle": lambda place: padded(place, slice(3, 7))}
    return cases | {"bool": lambda place: padded(place, dtype=torch.bool)}


def no_rows() -> Cases:
    def case(kind: str, use: str) -> Case:
        def work(place: Path) -> str:
            model, none = build(small_config("linear", aggregation=kind)), torch.zeros(0, 5, dtype=torch.long)
            call = model if use == "forward" else model.generate
            return raises(lambda: call(none), ["no rows", "at least one", "empty"])

        return work

    kinds = ("none", "residual", "grm", "soup", "ssc", "mean")
    return {f"{kind}, forward": case(kind, "forward") for kind in kinds} | {"grm, generate": case("grm", "generate")}


def errors() -> Cases:
    def case(kind: str, number: int) -> Case:
        @torch.no_grad()
        def work(place: Path) -> str:
            model, text = make(kind), tokens(1, 30)
            parts = [part for layer in model.model.layers for part in (layer, layer.mlp)] + [
                model.model.norm,
                model.lm_head,
            ]
            cache = MCCache(config=model.config)
            model(text[:, :20], cache=cache)
            handle = break_at(parts[number])
            try:
                model(text[:, 20:], cache=cache)
            except Planted:
                pass
            handle.remove()
            for use in (lambda: model(text[:, 20:], cache=cache), lambda: cache.save_pretrained(place, model)):
                raises(use, ["broken"])
            cache.reset()
            return close(model(text, cache=cache).logits, model(text).logits)

        return work

    names = [(kind, number) for kind in ("grm", "hybrid") for number in range(8)][:11]
    return {f"{kind}, part {number}": case(kind, number) for kind, number in names}


def interrupted() -> Cases:
    def case(kind: str, seed: int) -> Case:
        @torch.no_grad()
        def work(place: Path) -> str:
            model, text = make(kind), tokens(1, 12)
            whole = model.generate(text, **GREEDY)
            cache = generate_interrupted(model, text, random.Random(seed).uniform(0.0, 0.3))
            seen = int(cache.get_seq_length())
            try:
                found = model(whole[:, seen : seen + 3], cache=cache).logits
            except ValueError as error:
                expect("broken" in str(error), "unclear", error)
                return "refused"
            return close(found, model(whole).logits[:, seen : seen + 3]) if seen < whole.shape[1] else "right"

        return work

    return {f"{kind} {seed}": case(kind, seed) for kind in KINDS for seed in range(5)}


def threads() -> Cases:
    def case(seed: int) -> Case:
        @torch.no_grad()
        def work(place: Path) -> str:
            model, text = make("grm"), tokens(1, 40)
            cache = MCCache(config=model.config)
            model(text[:, :20], cache=cache)
            refusals, done, before = [], [], copy.deepcopy(cache)

            def read(begin: int) -> None:
                time.sleep(random.Random(seed + begin).random() / 500)
                try:
                    with torch.no_grad():
                        model(text[:, begin : begin + 10], cache=cache)
                    done.append(begin)
                except ValueError as error:
                    refusals.append(str(error))

            workers = [threading.Thread(target=read, args=[begin]) for begin in (20, 30)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            expect(all("in use" in text for text in refusals), "unclear", refusals)
            for begin in done:
                model(text[:, begin : begin + 10], cache=before)
            next_one = tokens(1, 3)
            return close(model(next_one, cache=cache).logits, model(next_one, cache=before).logits)

        return work

    return {f"moment {seed}": case(seed) for seed in range(20)}


@torch.no_grad()
def fork(place: Path) -> str:
    model, text = make("grm"), tokens(1, 30)
    cache = MCCache(config=model.config)
    model(text[:, :20], cache=cache)
    child = os.fork()
    whole = model(text).logits[:, 20:]
    good = relative_error(model(text[:, 20:], cache=cache).logits, whole) < 1e-4
    if child == 0:
        os._exit(0 if good else 1)
    expect(good and os.waitpid(child, 0)[1] == 0, "silent")
    return "right"


def tiny(memory: str = "linear", **fields):
    small = {"hidden_size": 16, "num_attention_heads": 1, "head_dim": 8, "value_head_dim": 8, "intermediate_size": 16}
    return build(small_config(memory, **small, **fields))


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def streams() -> Cases:
    def case(who: str) -> Case:
        @torch.no_grad()
        def work(place: Path) -> str:
            model = tiny(aggregation="grm", segment_size=64, max_cached_segments=8, cache_eviction=who)
            cache, sizes = MCCache(config=model.config), []
            for _ in range(50):
                model.model(tokens(1, 2000), cache=cache)
                sizes.append(resident())
            expect(max(sizes[10:]) - sizes[9] < 20, "silent", f"{sizes[9]:.0f} to {max(sizes):.0f} MiB")
            return "right"

        return work

    return {f"100 000 tokens, {who}": case(who) for who in ("oldest", "least_read")}


def million() -> Cases:
    def case(**fields) -> Case:
        @torch.no_grad()
        def work(place: Path) -> str:
            tiny(segment_size=64, **fields).model(tokens(1, 10**6), use_cache=False)
            return "right"

        return work

    return {
        "none": case(aggregation="none"),
        "grm, max_cached_segments=8": case(aggregation="grm", max_cached_segments=8),
        "residual, max_cached_segments=8": case(aggregation="residual", max_cached_segments=8),
        "ssc, max_cached_segments=8": case(aggregation="ssc", max_cached_segments=8),
        "grm, logarithmic": case(aggregation="grm", segmentation="logarithmic"),
    }


WATCH = """
import os, sys
sys.modules["mc_transformers"] = None
folder, home = sys.argv[1:]
events = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "socket.getaddrinfo"):
        events.append((event, str(args)[:200]))
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not os.path.abspath(args[0]).startswith(home) and args[0] != os.devnull:
            events.append((event, args[0]))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.addaudithook(watch)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
AutoTokenizer.from_pretrained(folder)
model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=3, pad_token_id=0)
assert type(model).__module__.startswith("transformers_modules"), type(model)
sys.exit(str(events) if events else 0)
"""


def bundles(good: Checkpoint) -> Cases:
    def run(place: Path) -> str:
        accepted(argv("bundle", good.folder, place / "out"))
        home = {name: str(place / "home") for name in ("HF_HOME", "TMPDIR", "HF_MODULES_CACHE")}
        (place / "home").mkdir()
        call = [sys.executable, "-c", WATCH, str(place / "out"), str(place / "home")]
        # no bytecode of Python's own
        found = subprocess.run(
            call, env=os.environ | home | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True
        )
        expect(found.returncode == 0, "ran code", found.stderr[-300:])
        return "right"

    def words(place: Path) -> str:
        accepted(argv("bundle", good.folder, place / "out"))
        for path in (place / "out").glob("*.py"):
            text = path.read_text()
            for word in (
                "import subprocess",
                "import socket",
                "import requests",
                "import pickle",
                " eval(",
                " exec(",
                "os.system",
            ):
                if word in text:
                    raise Bad("ran code", f"{path.name}: {word}")
        return "right"

    return {"what it does while it loads and generates": run, "what it imports": words}


def groups(place: Path) -> dict[str, Cases]:
    good = Checkpoint(place / "good")
    return {
        "ids and labels": ids(),
        "masks": masks(),
        "a batch of no rows": no_rows(),
        "an error inside a forward": errors(),
        "Ctrl-C in generate": interrupted(),
        "one cache, two threads": threads(),
        "fork after use": {"fork": fork},
        "memory of a stream": streams(),
        "10^6 tokens in one pass": million(),
        "code of a bundle": bundles(good),
    }
