"""A tiny Llama, made here, becomes a hybrid: every stage helps, a kill costs nothing, and what is refused."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mc_transformers as mc
from mc_transformers.cli import main as cli
from mc_transformers.conversion.distil.activations import activations
from mc_transformers.conversion.distil.corpus import Corpus, split_documents
from mc_transformers.conversion.distil.end_to_end import TopLogits, divergence, top_logits
from mc_transformers.conversion.distil.options import Options
from mc_transformers.conversion.distil.run import Distillation, distil
from mc_transformers.conversion.distil.start import start_mixers
from mc_transformers.conversion.distil.student import load_teacher, make_student, new_mixer


WORDS = "memory keeps a state of every segment and reads it again when it is asked".split()
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_texts(folder: Path, count: int, seed: int) -> None:
    folder.mkdir()
    draw = random.Random(seed)
    for number in range(count):
        (folder / f"{seed}-{number}.txt").write_text(" ".join(draw.choices(WORDS, k=300)), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a trained Llama, its tokenizer and texts."""
    folder = tmp_path_factory.mktemp("distil")
    write_texts(folder / "text", 10, seed=1)
    write_texts(folder / "held_out", 3, seed=2)
    tokenizer = mc.byte_tokenizer(64)
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **SIZES, **special))
    text = " ".join(random.Random(3).choices(WORDS, k=4000))
    rows = torch.tensor(tokenizer(text, verbose=False)["input_ids"]).unfold(0, 64, 64)
    optimizer = torch.optim.AdamW(llama.parameters(), 1e-2)
    for _ in range(80):
        batch = rows[torch.randint(len(rows), (16,))]
        llama(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    llama.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


def options(place: Path, output: Path, **changes) -> Options:
    texts = {"text": (str(place / "text"),), "held_out": (str(place / "held_out"),)}
    sizes = {"segment_size": 16, "length": 64, "batch": 4, "eval_windows": 8, "passes": 2, "top_k": 16}
    sizes |= {"dtype": "float32"}  # "auto" is bf16 on some CPUs
    steps = {"layers": (1, 2), "match_steps": 40, "end_steps": 30, "minutes": None, "end_lr": 5e-4}
    return Options(**{"teacher": str(place / "llama"), "output": str(output), **texts, **sizes, **steps} | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- stages
@pytest.mark.parametrize(
    ("memory", "aggregation", "trained", "steps"),
    [("gated_linear", "grm", "memory", 30), ("gated_delta", "none", "lora", 30), ("titans", "ssc", "all", 12)],
)
def test_every_stage_brings_the_hybrid_closer(place, tmp_path, memory, aggregation, trained, steps):
    chosen = {"memory": memory, "aggregation": aggregation, "trained": trained, "end_steps": steps}
    chosen |= {"match_steps": steps, "eval_windows": 4}
    record = distil(options(place, tmp_path / "out", layers="auto:2", **chosen))
    costs = record["single_layer_kl"]
    assert record["layers"] == sorted(sorted(range(3), key=lambda i: costs[str(i)])[:2]) and 0 not in record["layers"]
    for layer in map(str, record["layers"]):
        assert record["match_errors"][layer] < 0.95 * record["start_errors"][layer] < 0.9
    teacher, start, matched, final = (record[f"held_out_{x}"] for x in ("teacher", "start", "matched", "final"))
    assert teacher["kl"] < 1e-4 < final["kl"] < matched["kl"] < start["kl"]
    assert final["kl"] < 0.7 * start["kl"]
    saved = json.loads((tmp_path / "out" / "distil.json").read_text())
    assert saved == record and saved["end_to_end"]["tokens"] == steps * 4 * 64
    model = mc.MCForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert [kind == "memory_caching" for kind in model.config.layer_types] == [False, True, True]
    run = Distillation(options(place, tmp_path / "out", layers="auto:2", **chosen))
    assert run.measure(model, "again")["loss"] == pytest.approx(final["loss"], abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("memory")["input_ids"] == mc.byte_tokenizer(64)("memory")["input_ids"]
    # what is not trained stays the teacher's
    theirs, name = LlamaForCausalLM.from_pretrained(place / "llama").state_dict(), "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights(tmp_path / "out")[name], theirs[name]) == (trained == "memory")


@pytest.mark.parametrize("memory", ["gated_linear", "gated_delta", "titans"])
@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
@torch.no_grad()
def test_a_read_rule_begins_as_none(place, tmp_path, memory, aggregation):
    models = []
    for rule in ("none", aggregation):
        run = Distillation(options(place, tmp_path / rule, memory=memory, aggregation=rule))
        mixers = {layer: new_mixer(run.teacher, layer, run.options) for layer in (1, 2)}
        models.append(make_student(run.teacher, mixers, run.options))
    ids = run.train.batch([0, 1], "cpu")
    plain, anchored = (model(ids).logits for model in models)
    torch.testing.assert_close(anchored, plain, rtol=0, atol=1e-4)
    for layer in models[1].model.layers[1:]:
        layer.mixer.cached_scale.bias.fill_(1.0)
    assert (models[1](ids).logits - plain).abs().max() > 1e-2


@torch.no_grad()
def test_the_start_is_the_best_output_projection(place, tmp_path):
    """No other one, near or as converted, is closer to what the attention layer answers."""
    run = Distillation(options(place, tmp_path / "out"))
    mixer = start_mixers(run.teacher, [1], run.train, run.options)[1]
    pairs = [pairs[1] for pairs in activations(run.teacher, [1], run.train, range(16), run.options)]

    def error() -> float:
        return sum((mixer(x, mixer.table(x)) - y).square().sum().item() for x, y in pairs)

    best, weight = error(), mixer.o_proj.weight.clone()
    for seed in range(3):
        torch.manual_seed(seed)
        mixer.o_proj.weight.copy_(weight + 0.01 * weight.std() * torch.randn_like(weight))
        assert error() > best
    mixer.o_proj.weight.copy_(new_mixer(run.teacher, 1, run.options).o_proj.weight)
    assert error() > 1.5 * best


def test_activations_are_those_of_the_llama(place, tmp_path):
    run = Distillation(options(place, tmp_path / "out"))
    llama, found = LlamaForCausalLM.from_pretrained(place / "llama").eval(), {}
    for number, layer in enumerate(llama.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _, args, kwargs, out, number=number: found.update({number: (kwargs["hidden_states"], out[0])}),
            with_kwargs=True,
        )
    with torch.no_grad():
        llama(run.train.batch([0, 1, 2, 3], "cpu"))
    pairs = next(activations(run.teacher, [0, 1], run.train, range(4), run.options))
    for layer in (0, 1):
        for ours, theirs in zip(pairs[layer], found[layer], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert run.teacher.config.num_hidden_layers == len(run.teacher.model.layers) == 3  # the teacher is whole again


@torch.no_grad()
def test_divergence_is_kl(place, tmp_path):
    """With all logits kept; and with some kept, that of the kept ones and of the rest as one token."""
    run = Distillation(options(place, tmp_path / "out"))
    mixers = start_mixers(run.teacher, [1], run.train, run.options)
    student, ids = make_student(run.teacher, mixers, run.options), run.train.batch([5, 9], "cpu")
    hidden = [model.model(ids, use_cache=False).last_hidden_state for model in (run.teacher, student)]
    p, q = (F.log_softmax(run.teacher.lm_head(x), -1) for x in hidden)
    full = (p.exp() * (p - q)).sum(-1).mean()
    every = top_logits(run.teacher.lm_head, hidden[0], 10_000)
    torch.testing.assert_close(divergence(student.lm_head, hidden[1], *every), full, rtol=1e-3, atol=1e-5)
    kept, logs = top_logits(run.teacher.lm_head, hidden[0], 3)
    ours = q.gather(-1, kept)
    rest, our_rest = 1 - logs.exp().sum(-1), 1 - ours.exp().sum(-1)
    want = ((logs.exp() * (logs - ours)).sum(-1) + rest * (rest / our_rest).log()).mean()
    torch.testing.assert_close(divergence(student.lm_head, hidden[1], kept, logs), want, rtol=1e-3, atol=1e-5)
    assert want < full


@torch.no_grad()
def test_the_teacher_runs_once(place, tmp_path, monkeypatch):
    run = Distillation(options(place, tmp_path / "out"))
    numbers = [3, 11, 3 + len(run.train.order)]
    ids, logs = run.logits.batch(numbers)
    hidden = run.teacher.model(run.train.batch(numbers, "cpu"), use_cache=False).last_hidden_state
    want_ids, want_logs = top_logits(run.teacher.lm_head, hidden, 16)
    torch.testing.assert_close(logs, want_logs, rtol=2e-3, atol=2e-3)
    assert (ids == want_ids).float().mean() > 0.999 and torch.equal(ids[0], ids[2])
    again = TopLogits(run.logits.folder, run.teacher, run.train, run.options)
    monkeypatch.setattr(again, "_make", None)
    assert torch.equal(again.batch(numbers)[0], ids)


# --------------------------------------------------------------------------------------------------------------- kills
KILLED = """
import os, signal, sys
from mc_transformers.conversion.distil import loop
from mc_transformers.conversion.distil.options import Options
from mc_transformers.conversion.distil.run import distil

loop.SHARE = 0
saves, save = int(sys.argv[1]), loop.Training.save

def save_and_die(self):
    global saves
    save(self)
    saves -= 1
    if not saves:
        os.kill(os.getpid(), signal.SIGKILL)

loop.Training.save = save_and_die
distil(Options(**eval(sys.argv[2])))
"""


def test_a_killed_run_ends_with_the_same_weights(place, tmp_path):
    """Killed in the middle of matching, and in the middle of the last stage."""
    steps = {"match_steps": 20, "end_steps": 12, "save_seconds": 0.0, "passes": 1, "eval_windows": 2}
    distil(options(place, tmp_path / "whole", **steps))
    cut = options(place, tmp_path / "cut", **steps)
    for saves in (7, 20):
        command = [sys.executable, "-c", KILLED, str(saves), repr(vars(cut))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert not (tmp_path / "cut").exists()
    states = [torch.load(tmp_path / "cut-work" / "cut" / f"{x}.pt") for x in ("match", "end")]
    assert states[0]["step"] == 20 and 0 < states[1]["step"] < 12
    record = distil(cut)
    assert record["end_to_end"]["steps"] == 12
    whole, ours = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], ours[name]) for name in whole) and whole.keys() == ours.keys()
    assert {x.name for x in tmp_path.iterdir()} == {"whole", "whole-work", "cut", "cut-work"}


def test_a_folder_of_work_belongs_to_one_call(place, tmp_path):
    chosen = options(place, tmp_path / "out")
    Distillation(chosen)
    with pytest.raises(ValueError, match="`memory`='gated_delta', now it is 'titans'"):
        Distillation(replace(chosen, memory="titans"))
    Distillation(replace(chosen, minutes=3.0))
    Distillation(replace(chosen, work=str(chosen.folder), output="other", memory="titans"))  # beside the first
    with pytest.raises(ValueError, match="tokens of other texts"):
        Distillation(
            replace(chosen, work=str(chosen.folder), output="third", text=chosen.held_out, held_out=chosen.text)
        )


# -------------------------------------------------------------------------------------------------------------- budget
def test_the_budget_of_minutes_is_kept(place, tmp_path):
    record = distil(options(place, tmp_path / "out", match_steps=None, end_steps=None, minutes=0.2))
    seconds = record["seconds"]
    assert 1 < seconds["match"] and 1 < seconds["end_to_end"] and sum(seconds.values()) < 20
    assert sum(seconds.values()) > 8


def test_matching_uses_activations_as_often_as_told(place, tmp_path):
    record = distil(options(place, tmp_path / "out", match_steps=17, end_steps=1, passes=2))
    assert record["match"]["tokens"] == 17 * 4 * 64 and record["match"]["different_tokens"] == 2 * 8 * 4 * 64


# ------------------------------------------------------------------------------------------------------------- refused
def refused(capsys, *argv: object) -> str:
    """The one line with which the command fails."""
    assert cli.main(["distil", *map(str, argv)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mc-transformers distil: error: ")
    return error


def test_bad_input_is_named(place, tmp_path, capsys):
    out, text = tmp_path / "out", ["--text", place / "text"]
    assert "does not exist" in refused(capsys, tmp_path / "none", out, *text)
    assert "`layers`=[3] is not valid, allowed: numbers from 0 to 2" in refused(
        capsys, place / "llama", out, *text, "--layers", "1,3"
    )
    assert "`layers`='auto:x' is not valid" in refused(capsys, place / "llama", out, *text, "--layers", "auto:x")
    assert "`layers`=[3]" in refused(capsys, place / "llama", tmp_path / "b", *text, "--layers", "auto:4")
    assert "neither a file nor a folder" in refused(capsys, place / "llama", out, "--text", tmp_path / "x.txt")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("")
    assert "is one document" in refused(capsys, place / "llama", out, "--text", tmp_path / "a.txt")
    both = ["--text", tmp_path / "a.txt", tmp_path / "b.txt"]
    assert "does not fill one window of 1024" in refused(capsys, place / "llama", tmp_path / "c", *both)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    assert "b.txt is not UTF-8" in refused(capsys, place / "llama", tmp_path / "d", *both)
    config = json.loads((place / "llama" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "found model_type='gpt2'" in refused(capsys, tmp_path / "other", tmp_path / "e", *text)
    out.mkdir()
    (out / "mine").write_text("")
    assert "exists already" in refused(capsys, place / "llama", out, *text)
    assert {path.name for path in out.iterdir()} == {"mine"}


def test_one_document_in_ten_is_held_out(tmp_path):
    write_texts(tmp_path / "text", 40, seed=5)
    train, apart = split_documents([str(tmp_path / "text")], [])
    assert 1 <= len(apart) < 10 and len(train) + len(apart) == 40 and not set(train) & set(apart)
    again = split_documents([str(tmp_path / "text" / "5-7.txt"), str(tmp_path / "text")], [])
    assert set(again[1]) == set(apart)


def test_tokens_are_those_of_the_documents(place, tmp_path):
    tokenizer, paths = mc.byte_tokenizer(64), sorted((place / "text").iterdir())
    Corpus.build(tmp_path / "tokens", paths, tokenizer, 70_000)
    corpus = Corpus(tmp_path / "tokens", 50, seed=0)
    want = [i for path in paths for i in [tokenizer.eos_token_id, *tokenizer(path.read_text())["input_ids"]]]
    assert corpus.tokens.dtype == "uint32" and corpus.tokens.tolist() == want
    rows = torch.tensor(want[: len(corpus.order) * 50]).view(-1, 50)
    assert torch.equal(corpus.batch(range(len(corpus.order)), "cpu").sort(0).values, rows.sort(0).values)
    assert corpus.order != sorted(corpus.order)


def test_a_full_disk_leaves_nothing_half_written(place, tmp_path):
    """A limit of the size of files stands for it: no weights can be written."""
    chosen = options(place, tmp_path / "out", match_steps=2, end_steps=2)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code = "import sys\nfrom mc_transformers.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    argv = ["distil", chosen.teacher, chosen.output, "--text", *chosen.text, "--layers", "1", "--length", "64"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], preexec_fn=limit, capture_output=True, text=True, env=os.environ.copy()
    )
    assert done.returncode == 1 and "error" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-work" / "teacher").exists()


def test_a_teacher_of_this_family(place, tmp_path):
    """Converted before; and one that has memory layers already is refused."""
    chosen = options(place, tmp_path / "out", match_steps=2, end_steps=2)
    distil(chosen)
    teacher = chosen.folder / "teacher"
    Distillation(replace(chosen, teacher=str(teacher), output=str(tmp_path / "again")))
    assert not (tmp_path / "again-work" / "teacher").exists()
    with pytest.raises(ValueError, match="layers that are not attention"):
        Distillation(replace(chosen, teacher=chosen.output, output=str(tmp_path / "third")))
    assert load_teacher(teacher, "cpu").config.layer_types == ["full_attention"] * 3


def test_other_layers_can_attend_to_a_window(place, tmp_path):
    record = distil(options(place, tmp_path / "out", match_steps=8, end_steps=8, window=8))
    model = mc.MCForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.layer_types[0] == "sliding_attention" and model.config.sliding_window == 8
    assert record["held_out_final"]["kl"] < record["held_out_start"]["kl"]
