"""The command line: what it prints is true, and a failure is one line and a non-zero exit."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import build, family, name_of, small_config, tokens
from mc_transformers import MCCache, MCConfig, MCForCausalLM, byte_tokenizer
from mc_transformers.cli import evaluate
from mc_transformers.cli import main as cli
from mc_transformers.hub import facts
from mc_transformers.kernels.shared import ops as common


TEXT = "Memory caching keeps one state per segment. " * 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny byte-level model with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = byte_tokenizer(512)
    model = build(small_config("gated_linear", vocab_size=len(tokenizer), aggregation="grm"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = cli.main(list(map(str, argv)))
    return code, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------- env, info
def test_env_names_versions_and_ops(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0
    for line in (f"torch            {torch.__version__}", "transformers", "triton", "segment_read", "linear_write"):
        assert line in out


def test_env_names_the_backend_of_every_op_and_why(capsys, monkeypatch):
    def lines() -> dict[str, str]:
        return {line.split()[0]: line for line in run(capsys, "env")[1].splitlines() if line}

    kernels = list(Path(common.__file__).parents[1].rglob("*.py"))
    registered = re.findall(r"register_op\(\s*\"(\w+)\"", "".join(path.read_text() for path in kernels))
    assert set(common.OPS) == set(registered) and len(registered) > 8
    monkeypatch.setattr(common, "HAS_TRITON", False)
    for op, module in common.OPS.items():
        why = "it has no Triton kernels" if module is None else "`triton` is not installed"
        assert lines()[op].split()[1:3] == ["cpu", "torch"] and why in lines()[op]
    monkeypatch.setattr(common, "HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "mc_backend='triton'" in lines()["linear_write"]
    monkeypatch.setattr(facts, "choose_backend", lambda requested, op, x, width: "triton")
    assert lines()["linear_write"].split()[1:3] == ["cpu", "triton"]


@pytest.mark.parametrize("fields", family(state_init=["independent"], aggregation=["none", "grm"]), ids=name_of)
def test_cache_size_is_what_a_run_leaves(fields):
    config = small_config(**fields, num_hidden_layers=2)
    for length in (5, 3 * config.segment_size, 5 * config.segment_size + 3):
        cache = MCCache(config=config)
        with torch.no_grad():
            build(config)(tokens(1, length), cache=cache)
        assert facts.cache_bytes(config, length) == cache.nbytes


def test_bytes_per_segment_and_of_keys_and_values():
    # by hand: 2 memory layers, 2 heads, one fp32 state of 8 x 6 and one descriptor of 8 per head
    memory = small_config("linear", aggregation="grm", num_hidden_layers=2)
    assert facts.segment_bytes(memory) == 2 * 2 * (8 * 6 + 8) * 4
    layers = ["memory_caching", "full_attention", "memory_caching"]
    hybrid = small_config("linear", aggregation="grm", num_hidden_layers=3, layer_types=layers)
    assert facts.segment_bytes(hybrid) == facts.segment_bytes(memory)
    assert facts.key_value_bytes(hybrid, 100) == 2 * 3 * (2 * 8) * 100 * 4
    assert facts.segment_bytes(small_config("linear", aggregation="none")) == 0


def test_info_of_checkpoint_and_preset(capsys, checkpoint):
    code, out, _ = run(capsys, "info", checkpoint)
    parameters = build(MCConfig.from_pretrained(checkpoint)).num_parameters()
    assert code == 0 and f"{parameters:,}" in out and "gated_linear" in out and "1M" in out
    code, out, _ = run(capsys, "info", "mc-170m")
    assert code == 0 and "768" in out


# ------------------------------------------------------------------------------------------------------ generate, eval
def test_generate_streams_what_generate_returns(capsys, checkpoint):
    code, out, err = run(
        capsys, "generate", checkpoint, "--prompt", "Memory", "--temperature", 0, "--max-new-tokens", 12
    )
    tokenizer, model = cli.load_tokenizer(str(checkpoint)), cli.load_model(str(checkpoint))
    expected = model.generate(**tokenizer("Memory", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert code == 0 and out.rstrip("\n") == tokenizer.decode(expected[0], skip_special_tokens=True).rstrip("\n")
    assert "6 + 12 tokens" in err and "2 finished segments" in err


def test_generate_where_the_generation_config_has_no_cache(capsys, checkpoint, tmp_path):
    """As a training script leaves it: every token is still read once."""
    shutil.copytree(checkpoint, tmp_path / "model")
    model = cli.load_model(str(checkpoint))
    model.generation_config.use_cache = False
    model.generation_config.save_pretrained(tmp_path / "model")
    options = ("--prompt", "Memory", "--temperature", 0, "--max-new-tokens", 12)
    code, out, err = run(capsys, "generate", tmp_path / "model", *options)
    expected = run(capsys, "generate", checkpoint, *options)[1]
    assert code == 0 and out == expected and "2 finished segments" in err


def test_generate_reads_stdin_and_repeats_by_seed(capsys, checkpoint, monkeypatch):
    outputs = []
    for seed in (1, 1, 2):
        monkeypatch.setattr("sys.stdin", io.StringIO("one state"))
        code, out, _ = run(capsys, "generate", checkpoint, "--seed", seed, "--max-new-tokens", 8, "--skip-prompt")
        assert code == 0
        outputs.append(out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_generate_goes_on_from_a_memory(capsys, checkpoint, tmp_path):
    """Text in two calls with a memory between them, against the whole text in one."""
    memory, greedy = tmp_path / "memory", ("--temperature", 0, "--skip-prompt")
    first, second = "Memory caching keeps", " one state"
    read = ("generate", checkpoint, "--prompt", first, *greedy, "--max-new-tokens", 1, "--memory", memory)
    code, out, err = run(capsys, *read)
    assert code == 0 and "remembered" not in err
    before = (memory / "memory.safetensors").read_bytes()
    after = ("generate", checkpoint, "--prompt", second, *greedy, "--max-new-tokens", 9, "--memory", memory)
    code, out, err = run(capsys, *after, "--keep-memory")
    expected = run(capsys, "generate", checkpoint, "--prompt", first + second, *greedy, "--max-new-tokens", 9)[1]
    assert code == 0 and out == expected and f"{len(first)} remembered + {len(second)} + 9 tokens" in err
    assert (memory / "memory.safetensors").read_bytes() == before
    assert run(capsys, *after)[1] == expected
    assert (memory / "memory.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "file"], "is not a folder"),
        (["--memory", "typo", "--keep-memory"], "typo holds no memory"),
        (["--keep-memory"], "without --memory"),
        (["--memory", "file/notes"], "Not a directory"),
    ],
)
def test_generate_refuses_a_memory_before_it_reads(capsys, checkpoint, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, "generate", checkpoint, "--prompt", "Memory", *options)
    assert code == 1 and out == "" and words in err


def test_generate_reads_a_long_prompt_in_pieces(capsys, checkpoint, monkeypatch):
    argv = ("generate", checkpoint, "--prompt", TEXT, "--temperature", 0, "--max-new-tokens", 4, "--skip-prompt")
    whole = run(capsys, *argv)
    lengths, forward = [], MCForCausalLM.forward

    def counting(self, input_ids, **options):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **options)

    monkeypatch.setattr(MCForCausalLM, "forward", counting)
    monkeypatch.setattr(cli, "PIECE", 100)
    assert run(capsys, *argv)[:2] == whole[:2]
    assert max(lengths) == 100 and sum(lengths) == len(TEXT) + 3


def test_eval_is_the_loss_of_the_model(capsys, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "eval.json"
    code, out, _ = run(
        capsys, "eval", checkpoint, tmp_path / "text.txt", "--length", 128, "--batch-size", 2, "--output", output
    )
    record = json.loads(output.read_text())
    tokenizer, model = cli.load_tokenizer(str(checkpoint)), cli.load_model(str(checkpoint))
    blocks = evaluate.blocks_of(TEXT, tokenizer, 128)
    assert code == 0 and len(blocks) == record["blocks"] == len(TEXT) // 128
    with torch.no_grad():
        loss = model(blocks, labels=blocks).loss.item()
        prefix = model(blocks[:, :64], labels=blocks[:, :64]).loss.item()
    results = {result["metric"]: result["value"] for result in record["results"]}
    assert results == pytest.approx({"loss": loss, "perplexity": math.exp(loss)}, rel=1e-5)
    assert f"{loss:.4f}" in out
    first, second = record["positions"]
    assert (first["first"], first["last"], second["first"], second["last"]) == (1, 63, 64, 127)
    assert first["loss"] == pytest.approx(prefix, rel=1e-5)


def test_eval_makes_the_folder_of_its_output(capsys, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    argv = ("eval", checkpoint, tmp_path / "text.txt", "--length", 128, "--output")
    assert run(capsys, *argv, tmp_path / "new" / "eval.json")[0] == 0
    assert json.loads((tmp_path / "new" / "eval.json").read_text())["length"] == 128
    monkeypatch.setattr(evaluate, "evaluate_text", None)  # what follows is refused before the work
    code, _, err = run(capsys, *argv, tmp_path / "new")
    assert code == 1 and "is a folder" in err


def test_eval_in_pieces_of_the_head(checkpoint, monkeypatch):
    model, blocks = cli.load_model(str(checkpoint)), tokens(3, 50)
    whole = evaluate.position_losses(model, blocks, 3)
    monkeypatch.setattr(evaluate, "HEAD_CHUNK", 7)
    torch.testing.assert_close(evaluate.position_losses(model, blocks, 2), whole)


def test_position_ranges_double_and_cover():
    assert evaluate.position_ranges(600) == [(1, 64), (64, 128), (128, 256), (256, 512), (512, 600)]
    assert evaluate.position_ranges(10) == [(1, 10)]


# ---------------------------------------------------------------------------------------------------------- failures
def damaged(folder, checkpoint, change) -> str:
    shutil.copytree(checkpoint, folder / "copy")
    change(folder / "copy")
    return str(folder / "copy")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mixer.u_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def make_llama(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def break_config(folder):
    (folder / "config.json").write_text('{"model_type": "mc",')


def bad_value(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"aggregation": "soupe"}))


def drop_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, ["damaged"]),
        (drop_a_weight, ["1 missing keys", "u_proj"]),
        (make_llama, ["llama", "LlamaForCausalLM", "'mc'", "convert"]),
        (break_config, ["config.json"]),
        (bad_value, ["aggregation", "soupe", "grm"]),
        (drop_tokenizer, ["no tokenizer"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    ],
    ids=["truncated", "missing", "other", "config", "value", "tokenizer", "no-weights"],
)
def test_failures_are_one_line(capsys, checkpoint, tmp_path, change, words):
    folder = damaged(tmp_path, checkpoint, change)
    code, out, err = run(capsys, "generate", folder, "--prompt", "Memory")
    *_, line = err.rstrip("\n").splitlines()
    assert code == 1 and out == "" and "Traceback" not in err
    assert line.startswith("mc-transformers generate: error: ")
    assert all(word in line for word in words), line


def test_no_such_checkpoint_and_short_text(capsys, checkpoint, tmp_path):
    code, _, err = run(capsys, "info", tmp_path / "nowhere")
    assert code == 1 and "nowhere" in err and len(err.splitlines()) == 1
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, err = run(capsys, "info", tmp_path)
    assert code == 1 and "holds no config.json" in err and "adapter" in err
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xff")
    code, _, err = run(capsys, "eval", checkpoint, tmp_path / "bytes.bin")
    assert code == 1 and "bytes.bin is not UTF-8 text" in err
    (tmp_path / "short.txt").write_text("short")
    code, _, err = run(capsys, "eval", checkpoint, tmp_path / "short.txt", "--length", 64)
    assert code == 1 and "--length must be <= 5" in err
    (tmp_path / "empty.txt").touch()
    code, _, err = run(capsys, "eval", checkpoint, tmp_path / "empty.txt")
    assert code == 1 and "has 0 tokens" in err and "two tokens or more" in err


def test_a_token_is_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.one_line(OSError("401 for\n hf_secret"), "model") == "401 for ***"
    assert cli.one_line(OSError(f"401 for hf_{'aB3' * 11}"), "model") == "401 for ***"
    assert cli.one_line(KeyError("x"), "model").startswith("model is damaged, or holds values of a wrong kind ('x')")


def test_help_and_usage(capsys):
    for command in ("env", "info", "generate", "eval", "bundle", "publish", "convert", "distil"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0 and f"examples:\n  mc-transformers {command}" in capsys.readouterr().out
    wrong = [
        ["unknown"],
        ["eval", "model", "text", "--length", "1"],
        ["generate", "model", "--temperature", "nan"],
        ["generate", "model", "--top-p", "2"],
        ["generate", "model", "--top-k", "-1"],
        ["convert", "a", "b", "--layers", "x"],
        ["distil", "a", "b", "--text", "c", "--layers", "1,x"],
    ]
    for argv in wrong:
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 2
        assert argv == ["unknown"] or "is not valid, allowed: " in capsys.readouterr().err


def test_as_a_module():
    argv = [sys.executable, "-m", "mc_transformers", "info", "/no/such/folder"]
    failed = subprocess.run(argv, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and "/no/such/folder" in failed.stderr
