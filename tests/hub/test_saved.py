"""Saved folders are read by whoever comes: by processes without this package, and by later versions of it."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, Trainer, TrainingArguments

import mc_transformers as mc
from helpers import build, small_config, tokens
from mc_transformers.configuration_mc import LAYER_TYPES_IN_FILES
from mc_transformers.hub.bundle import bundle


ROOT = Path(__file__).parents[2]
SAVED = sorted((ROOT / "tests" / "data" / "saved").iterdir())  # one folder per version, by tests/data/write_saved.py
ALONE = r"""
import os, sys
sys.modules["mc_transformers"] = None  # as if it were not installed
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
def show(x):
    print("\n>", x)
"""


def alone(code: str, cwd: Path) -> list[str]:
    """What code `show`s in a process without this package, which can ask nobody for leave to run code."""
    command = [sys.executable, "-c", ALONE + code]
    run = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return re.findall("> (.*)", run.stdout)  # Transformers asks on stdout, too


def train(folder: Path, model, tokenizer, **options) -> Trainer:
    """Two steps, a checkpoint after each."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(8, 12, seed=3) % 20]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, **options
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def test_tokenizers_load_alone(tmp_path):
    """Data preparation and servers load no more than a tokenizer, from every kind of folder."""
    shipped = ROOT / "model_cards" / "checkpoints" / "python-source"
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    layers = {"num_hidden_layers": 2, "layer_types": ["memory_caching", "full_attention"]}
    model = build(small_config(vocab_size=len(tokenizer), **layers))
    for folder in ("model", "decoder"):
        (model if folder == "model" else model.model).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    bundle(str(tmp_path / "model"), tmp_path / "bundle", verify=False)
    train(tmp_path / "run", model, tokenizer).train()
    folders = [shipped, *(tmp_path / name for name in ("model", "decoder", "bundle", "run/checkpoint-2"))]
    code = f"""
for folder in {list(map(str, folders))}:
    for trust in (None, False, True):
        show(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)("a segment")["input_ids"])
"""
    assert alone(code, tmp_path) == [str(tokenizer("a segment")["input_ids"])] * 3 * len(folders)


def test_layer_types_have_their_own_name_in_files_only(tmp_path):
    types = ["memory_caching", "full_attention"]
    config = mc.MCConfig(num_hidden_layers=2, layer_types=types)
    for use_diff in (True, False):
        config.to_json_file(tmp_path / "config.json", use_diff)
        found = json.loads((tmp_path / "config.json").read_text())
        assert found[LAYER_TYPES_IN_FILES] == types and "layer_types" not in found
        assert PreTrainedConfig.from_pretrained(tmp_path).model_type == "mc"  # which refuses the usual name
        for again in (mc.MCConfig.from_pretrained(tmp_path), mc.MCConfig(**found)):
            assert again.to_dict() == config.to_dict() | {"_name_or_path": again._name_or_path}
    for fields in (config.to_dict(), config.to_diff_dict()):
        assert fields["layer_types"] == types and LAYER_TYPES_IN_FILES not in fields
    asked = mc.MCConfig(**found | {"layer_types": ["memory_caching"] * 2})
    assert asked.layer_types == ["memory_caching"] * 2
    with pytest.raises(ValueError, match="layer_types"):
        mc.MCConfig(**found | {LAYER_TYPES_IN_FILES: ["memory"]})


# -------------------------------------------------------------------------------------------------- earlier versions
@pytest.fixture(params=SAVED, ids=lambda folder: folder.name)
def saved(request) -> Path:
    return request.param


@torch.no_grad()
def test_checkpoints_and_memories_of_earlier_versions_load(saved):
    expected = load_file(saved / "expected.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(saved / "checkpoint", output_loading_info=True)
    assert type(model) is mc.MCForCausalLM and not report["missing_keys"] and not report["unexpected_keys"]
    ids, logits = expected["input_ids"], expected["logits"]
    torch.testing.assert_close(model.eval()(ids).logits, logits, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="format 1"):
        cache = mc.MCCache.from_pretrained(saved / "memory", model)
    rest = slice(cache.get_seq_length(), None)
    torch.testing.assert_close(model(ids[:, rest], cache=cache).logits, logits[:, rest], rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(saved / "checkpoint")("a c")["input_ids"] == [2, 4]


def test_bundles_of_earlier_versions_load_alone(saved, tmp_path, monkeypatch):
    with tarfile.open(saved / "bundle.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"""
expected = load_file({str(saved / "expected.safetensors")!r})
model = AutoModelForCausalLM.from_pretrained("bundle", trust_remote_code=True).eval()
torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], rtol=1e-4, atol=1e-4)
show(type(model).__module__.split(".")[0])
show(AutoTokenizer.from_pretrained("bundle", trust_remote_code=True)("a c")["input_ids"])
"""
    assert alone(code, tmp_path) == ["transformers_modules", "[2, 4]"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "bundle")) is mc.MCForCausalLM


def test_runs_of_earlier_versions_go_on(saved, tmp_path):
    """The Trainer reads a checkpoint's config.json as a bare config before it resumes."""
    folder = saved / "checkpoint"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    train(tmp_path, model, tokenizer).train()
    shutil.copy(folder / "config.json", tmp_path / "checkpoint-1")
    again = train(tmp_path, model, tokenizer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2
