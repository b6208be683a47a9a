"""A bundle is generated from the package as it is, loads where the package is not installed, and computes the same."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports

import mc_transformers as mc
from helpers import MEMORY_NAMES, build, small_config, tokens
from mc_transformers import byte_tokenizer
from mc_transformers.cli import main as cli
from mc_transformers.hub import bundle, card, facts, figure, flat
from mc_transformers.modeling_mc.compat import CACHE_NAME


MARK = 9.25e-7  # a number that nothing else in a card can be


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A hybrid of several segments with a tokenizer, saved in more than one shard."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = byte_tokenizer(512)
    layers = ["memory_caching", "full_attention", "memory_caching"]
    config = small_config("gated_delta", vocab_size=len(tokenizer), num_hidden_layers=3, layer_types=layers)
    build(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundled(checkpoint, tmp_path_factory):
    """The bundle of the checkpoint; that it loads alone and is equal was verified while it was made."""
    return bundle.bundle(str(checkpoint), tmp_path_factory.mktemp("bundled") / "my-model", max_shard_size="20KB")


# --------------------------------------------------------------------------------------------------------- flat files
def test_flat_files_import_only_each_other_and_what_transformers_has(tmp_path):
    files = flat.flat_files()
    for name, source in files.items():
        (tmp_path / name).write_text(source)
        compile(source, name, "exec")
        assert "from .." not in source and "from . " not in source
    for name in files:
        assert set(get_imports(tmp_path / name)) <= flat.REQUIRED, name
    assert not flat.unreachable(files, tmp_path)
    assert {"configuration_mc.py", "modeling_mc.py", "kernels_read_segment.py"} <= set(files)
    assert len([name for name in files if "triton" in name]) == len(list((flat.ROOT / "kernels").rglob("*triton*.py")))


def package(folder, monkeypatch, **sources):
    """A small package in the place of ours, by dotted module names with `__` for the dot."""
    for name, source in sources.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(flat, "ROOT", folder)
    monkeypatch.setattr(flat, "_lazy_modules", list)


def test_imports_are_rewritten_from_anywhere(tmp_path, monkeypatch):
    package(
        tmp_path,
        monkeypatch,
        configuration_mc="import os\n",
        modeling_mc__model="from ..configuration_mc import (\n    os,\n)\nfrom .parts import A\n",
        modeling_mc__parts__a="A = 1\n",
    )
    parts = tmp_path / "modeling_mc" / "parts" / "__init__.py"
    parts.write_text("from .a import A\nfrom ...configuration_mc import os\n")
    files = flat.flat_files()
    assert "from .configuration_mc import (\n    os,\n)\nfrom .modeling_mc_parts import A" in files["modeling_mc.py"]
    assert "from .modeling_mc_parts_a import A\nfrom .configuration_mc import os" in files["modeling_mc_parts.py"]


def test_optional_imports_are_wrapped(tmp_path, monkeypatch):
    source = "import torch\n\n\ndef f():\n    from fla.ops import (\n        x,\n    )\n    return x\n"
    package(tmp_path, monkeypatch, configuration_mc="import triton\n", modeling_mc__model=source)
    for name, text in flat.flat_files().items():
        (tmp_path / name).write_text(text)
        compile(text, name, "exec")
        assert set(get_imports(tmp_path / name)) <= {"torch"} and "    raise" in text


@pytest.mark.parametrize("line", ["from .parts import a", "from . import parts", "from .nowhere import b"])
def test_imports_that_cannot_be_flat_are_refused(tmp_path, monkeypatch, line):
    package(tmp_path, monkeypatch, configuration_mc="", modeling_mc__model=f"{line}\n", modeling_mc__parts__a="")
    with pytest.raises(ValueError, match="modeling_mc.model.*(module)"):
        flat.flat_files()


# ------------------------------------------------------------------------------------------------------------- bundle
def test_bundle_is_complete(bundled):
    names = {path.name for path in bundled.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "LICENSE"} <= names
    assert set(flat.flat_files()) <= names and not any(name.endswith(".partial") for name in names)
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert json.loads((bundled / "config.json").read_text())["auto_map"] == flat.AUTO_MAP
    for target in flat.AUTO_MAP.values():
        module, name = target.split(".")
        assert f"class {name}(" in (bundled / f"{module}.py").read_text()


def test_plugin_wins_where_it_is_installed(bundled):
    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(bundled, trust_remote_code=trust)
        assert type(model) is mc.MCForCausalLM
        assert type(AutoConfig.from_pretrained(bundled, trust_remote_code=trust)) is mc.MCConfig


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_bundle_and_plugin_in_one_process(memory, tmp_path, monkeypatch):
    """Both register ops, cache layers and masks; neither may disturb the other."""
    ours = build(small_config(memory))
    ours.save_pretrained(tmp_path / "both")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    cls = get_class_from_dynamic_module("modeling_mc.MCForCausalLM", str(tmp_path / "both"))
    theirs = cls.from_pretrained(tmp_path / "both").eval()
    assert cls.__module__.startswith("transformers_modules.")
    ids = tokens(2, 21)
    for model in (ours, theirs, ours):
        caches = [mc.MCCache(config=ours.config), None]
        for cache in caches if model is ours else [None]:
            generated = model.generate(ids, cache=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
            assert generated.shape == (2, 26)
            assert cache is None or (cache.nbytes > 0 and cache.num_segments > 0)
        for options in ({}, {"cache_implementation": "static"}):  # each reads through its own code
            options |= {"max_new_tokens": 2, "disable_compile": True, "return_dict_in_generate": True}
            layers = model.generate(ids, **options)[CACHE_NAME].layers
            assert {type(layer).__module__.split(".")[0] for layer in layers} == {type(model).__module__.split(".")[0]}
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    loss = [model.train()(ids, labels=ids).loss for model in (ours, theirs)]
    [x.backward() for x in loss]
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_a_bundle_saved_again_is_a_bundle(bundled, tmp_path):
    """Without the package: Transformers copies the code of a model that it has loaded from a repository."""
    code = f"""
import sys
sys.modules["mc_transformers"] = None
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(bundled)!r}, trust_remote_code=True)
model.save_pretrained("again")
model.model.save_pretrained("decoder")
AutoModel.from_pretrained({str(bundled)!r}, trust_remote_code=True).save_pretrained("loaded")
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    for folder in ("again", "decoder", "loaded"):
        again = {path.name: path.read_text() for path in (tmp_path / folder).glob("*.py")}
        assert again == flat.flat_files(), folder


def test_verification_sees_a_difference(bundled, checkpoint, tmp_path):
    model = cli.load_model(str(checkpoint))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-4
    with pytest.raises(RuntimeError, match="does not compute"):
        bundle.verify_bundle(bundled, model)


def test_verification_sees_a_missing_file(bundled, checkpoint, tmp_path):
    shutil.copytree(bundled, tmp_path / "copy")
    (tmp_path / "copy" / "kernels_read_segment.py").unlink()
    with pytest.raises(RuntimeError, match="does not load on its own"):
        bundle.verify_bundle(tmp_path / "copy", cli.load_model(str(checkpoint)))


def test_nothing_is_left_of_a_bundle_that_fails(checkpoint, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "write_card", full)
    assert cli.main(["bundle", str(checkpoint), str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_bundle_refuses_to_overwrite(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert cli.main(["bundle", str(checkpoint), str(tmp_path / "out"), "--no-verify"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert cli.main(["bundle", str(checkpoint), str(tmp_path / "out"), "--no-verify", "--overwrite"]) == 0
    assert "mine.txt" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_code_is_left_out_on_demand_and_in_a_trainers_checkpoints(tmp_path):
    """A bundle has it whatever it is called."""
    model = build(small_config())
    for name, options in (("checkpoint-3", {}), ("plain", {"with_code": False})):
        model.save_pretrained(tmp_path / name, **options)
        assert not list((tmp_path / name).glob("*.py")) and not (tmp_path / name / "LICENSE").exists()
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / name)) is mc.MCForCausalLM
        bundle.write_bundle(model, tmp_path / name, "me/model")
        assert (tmp_path / name / "modeling_mc.py").exists()


def test_heads_are_bundled_too(tmp_path):
    model = mc.MCForSequenceClassification(small_config("linear", num_labels=3, pad_token_id=0)).eval()
    bundle.write_bundle(model, tmp_path, "me/scores")
    bundle.verify_bundle(tmp_path, model)
    assert "AutoModelForSequenceClassification" in (tmp_path / "README.md").read_text()
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is type(model)


# --------------------------------------------------------------------------------------------------------------- card
def result(**fields) -> dict:
    return {"metric": "loss", "value": MARK, "dataset": "held-out", "unit": "nats per token"} | fields


def test_card_says_what_the_config_says(bundled):
    loaded = ModelCard.load(bundled / "README.md")
    config = mc.MCConfig.from_pretrained(bundled)
    assert loaded.data.library_name == "transformers" and loaded.data.pipeline_tag == "text-generation"
    assert "gated_delta" in loaded.data.tags and loaded.data.license is None
    assert f"{mc.MCForCausalLM(config).num_parameters():,}" in loaded.text
    assert "1 of its 3 layers are attention layers" in loaded.text
    assert "No result is recorded" in loaded.text
    usage = loaded.text.split("```python")[1].split("```")[0].strip().splitlines()
    assert len(usage) == 5 and all("trust_remote_code=True" in line for line in usage[1:3])


@pytest.mark.parametrize(
    ("fields", "said", "not_said"),
    [
        ({"aggregation": "none"}, ["one running state", "one state of fixed size"], ["every segment", "grows by"]),
        ({"layer_types": ["full_attention"]}, ["A Transformer", "all of its 1 layers"], ["recurrent", "compressed"]),
        ({"max_cached_segments": 3}, ["after every segment of 8", "Not more than 3 segments"], ["grows"]),
        ({"segmentation": "logarithmic"}, ["when the length doubles"], ["grows by one memory per"]),
        ({}, ["grows by one memory per 8 tokens"], ["one running state", "attention layers"]),
    ],
)
def test_card_says_what_the_cache_keeps(fields, said, not_said):
    config = small_config("linear", **{"aggregation": "grm", "segment_size": 8, "num_hidden_layers": 1} | fields)
    text = str(card.render(config, "me/model"))
    assert all(words in text for words in said) and not any(words in text for words in not_said), text


def links(folder) -> list[str]:
    """Files that the card of a bundle links to."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]


def test_card_shows_the_memory_against_length(bundled):
    assert links(bundled) == ["memory.png"]
    content = (bundled / "memory.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 100_000
    config = mc.MCConfig.from_pretrained(bundled)
    ours, theirs = figure.curves(config).values()
    assert ours[1::4] == [facts.cache_bytes(config, length) for length in (4096, 1048576)]
    assert theirs[0] == facts.key_value_bytes(config, 1024)
    assert figure.draw_memory(config, bundled) == "memory.png"
    assert (bundled / "memory.png").read_bytes() == content  # so that nothing new is uploaded


def test_card_without_matplotlib_has_no_broken_link(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = bundle.bundle(str(checkpoint), tmp_path / "out", verify=False)
    assert links(out) == [] and not list(out.glob("*.png"))
    assert "| 1M |" in (out / "README.md").read_text(encoding="utf-8")


def test_results_come_from_json_and_nowhere_else(tmp_path, capsys, checkpoint):
    file = tmp_path / "eval.json"
    known = result(dataset_id="me/bench", task_id="all", metric="accuracy")
    file.write_text(json.dumps({"results": [result(), known]}))
    code = cli.main(
        [
            "bundle",
            str(checkpoint),
            str(tmp_path / "out"),
            "--no-verify",
            "--results",
            str(file),
            "--license",
            "mit",
            "--base-model",
            "me/base",
            "--language",
            "en",
            "de",
            "--datasets",
            "me/data",
        ]
    )
    assert code == 0
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| held-out | loss | 9.25e-07 nats per token |" in loaded.text
    data = loaded.data.to_dict()
    assert data["license"] == "mit" and data["base_model"] == "me/base"
    assert data["language"] == ["en", "de"] and data["datasets"] == ["me/data"]
    (entry,) = yaml.safe_load((tmp_path / "out" / ".eval_results" / "me--bench.yaml").read_text())
    assert entry == {"dataset": {"id": "me/bench", "task_id": "all"}, "value": MARK, "notes": "accuracy"}


BAD = ["{", "[]", {"results": [{"metric": "loss"}]}, {"results": [{"metric": "m", "dataset": "d", "value": "x"}]}]


@pytest.mark.parametrize("content", [x if isinstance(x, str) else json.dumps(x) for x in BAD])
def test_files_without_results_are_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json holds no results"):
        card.read_results(tmp_path / "x.json")
