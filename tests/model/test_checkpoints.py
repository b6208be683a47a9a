"""The trained checkpoints of model_cards/checkpoints load by the Auto classes and do what their cards say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import mc_transformers as mc
from benchmarks.tasks.recall import RecallConfig, draw_test
from mc_transformers.modeling_mc.compat import CACHE_NAME


ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "model_cards" / "checkpoints").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_small_and_says_how_it_was_made(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    assert not list(folder.glob("*.py")) and (folder / "model.safetensors").exists()
    made_with = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    assert made_with["results"] and all(f"{entry['value']:.4g}" in card for entry in made_with["results"])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_generates_with_a_cache(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, return_dict_in_generate=True)
    assert out[CACHE_NAME].get_seq_length() == 4


@torch.no_grad()
def test_recall_answers_at_four_times_the_training_segments():
    folder = ROOT / "model_cards" / "checkpoints" / "recall"
    made_with = json.loads((folder / "results.json").read_text())
    config = RecallConfig(**made_with["settings"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    for entry, times in zip(made_with["results"], (1, 4), strict=True):
        ids, labels = (x[:64] for x in draw_test(config, times * config.seq_len))
        cache = mc.MCCache(config=model.config)
        logits = model(ids, cache=cache).logits
        assert cache.num_segments == times * config.seq_len // config.segment_size
        right = (logits.argmax(-1) == labels)[labels != -100].float().mean().item()
        assert right == pytest.approx(entry["value"], abs=0.03) and right > 0.9
    cut = ids.clone()
    cut[:, : config.seq_len // 2] = 0  # without the pairs there is nothing to recall
    assert (model(cut).logits.argmax(-1) == labels)[labels != -100].float().mean() < 0.1


@torch.no_grad()
def test_the_language_model_knows_its_language():
    folder = ROOT / "model_cards" / "checkpoints" / "python-source"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    source = "import os\n\n\nclass Path:\n    def __init__(self, name):\n        self.name = name\n\n    def exists("
    ids = tokenizer(source, return_tensors="pt").input_ids
    swapped = ids.flip(1)
    assert model(ids, labels=ids).loss < 2.5 < model(swapped, labels=swapped).loss
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0]).startswith(source) and out.shape[1] == ids.shape[1] + 8


def test_the_language_model_begins_by_itself():
    """An empty prompt is the begin of a text: the config says which token that is."""
    write = pipeline("text-generation", str(ROOT / "model_cards" / "checkpoints" / "python-source"))
    for config in (write.model.config, write.model.generation_config):
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (write.tokenizer.bos_token_id, write.tokenizer.eos_token_id, write.tokenizer.pad_token_id)
    (written,) = write("", max_new_tokens=30, do_sample=False)
    assert len(written["generated_text"]) > 10
