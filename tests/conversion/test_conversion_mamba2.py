"""Mamba-2 of Transformers, converted: the same logits and tokens, and a start for every aggregation."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from conversion_sources import IDS, SIZES, TOKENS, make_source, train
from mc_transformers import MCForCausalLM
from mc_transformers.cli import main as cli
from mc_transformers.conversion.checkpoint import Folder
from mc_transformers.conversion.convert import convert, verify_logits


# Transformers 5.16 normalises all groups as one, which its later versions and the authors' code do not
GROUPS = 2 if "group_size" in inspect.signature(MambaRMSNormGated).parameters else 1
FIELDS = SIZES | {
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 8,
    "state_size": 10,
    "n_groups": GROUPS,
    "expand": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
}


def mamba2(folder, **fields) -> Mamba2ForCausalLM:
    return make_source(Mamba2ForCausalLM, Mamba2Config(**FIELDS | fields), folder)


@pytest.fixture
def source(tmp_path):
    return mamba2(tmp_path / "source")


def state_spaces(folder, target, suffix: str = "bin", **layer) -> None:
    """Rewrites a folder of Transformers in the layout of Mamba-2's authors."""
    theirs = json.loads((folder / "config.json").read_text())
    target.mkdir()
    config = {
        "d_model": theirs["hidden_size"],
        "d_intermediate": 0,
        "n_layer": theirs["num_hidden_layers"],
        "vocab_size": theirs["vocab_size"] - 5,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": theirs["vocab_size"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": theirs["state_size"],
            "headdim": theirs["head_dim"],
            "ngroups": theirs["n_groups"],
            "conv_bias": theirs["use_conv_bias"],
            **layer,
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"].clone())
    if suffix == "bin":
        torch.save(weights, target / "pytorch_model.bin")
    else:
        save_file(weights, target / "model.safetensors")


VARIANTS = [{}, {"n_groups": 1}, {"tie_word_embeddings": True}, {"use_conv_bias": False}]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_source(tmp_path, fields):
    theirs = mamba2(tmp_path / "source", **fields)
    convert(tmp_path / "source", tmp_path / "ours", max_shard_size="10KB", verify=True)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-4
    assert torch.equal(ours.generate(IDS, **TOKENS), theirs.generate(IDS, **TOKENS))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_the_authors_layout_gives_the_same_model(tmp_path, fields, suffix):
    theirs = mamba2(tmp_path / "source", **fields)
    state_spaces(tmp_path / "source", tmp_path / "authors", suffix, expand=2)
    convert(tmp_path / "authors", tmp_path / "ours", verify=True)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert ours.config.tie_word_embeddings == fields.get("tie_word_embeddings", False)
    assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"layer": "Mamba1"}, "ssm_cfg.layer.*'Mamba1'.*'Mamba2'"),
        ({"D_has_hdim": True}, "D_has_hdim"),
        ({"norm_before_gate": True}, "norm_before_gate"),
        ({"dt_limit": [0.0, 0.5]}, "dt_limit"),
        ({"d_ssm": 24}, "d_ssm"),
        ({"swirl": 1}, "an unknown option.*swirl"),
    ],
)
def test_what_the_authors_layer_has_beyond_that_is_named(tmp_path, source, layer, words):
    state_spaces(tmp_path / "source", tmp_path / "authors", **layer)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "authors", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("aggregation", ["mean", "grm", "ssc"])
def test_it_runs_and_trains_with_segments(tmp_path, source, aggregation):
    convert(tmp_path / "source", tmp_path / "ours", aggregation=aggregation, segment_size=8)
    model = MCForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():  # one segment: the start is the source
        assert (model.eval()(IDS[:, :8]).logits - source(IDS[:, :8]).logits).abs().max() < 1e-4
    losses = train(model)
    assert losses[-1] < losses[0]
    if aggregation != "mean":
        assert all(layer.mixer.u_proj.weight.abs().max() > 0 for layer in model.model.layers)


def test_new_gates_start_as_the_mean(tmp_path, source):
    logits = []
    for aggregation in ("mean", "grm"):
        convert(tmp_path / "source", tmp_path / aggregation, aggregation=aggregation, segment_size=8)
        with torch.no_grad():
            logits.append(MCForCausalLM.from_pretrained(tmp_path / aggregation).eval()(IDS).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_decay_stays_fp32_in_a_half_precision_model(tmp_path, source):
    convert(tmp_path / "source", tmp_path / "ours", dtype="bfloat16")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    fp32 = {name.split(".", 4)[4] for name, x in weights.items() if x.dtype == torch.float32}
    assert fp32 == {"a_bias.bias", "memory.A_log.bias", "skip.bias"}


def test_command_line(tmp_path, source, capsys):
    folders = (str(tmp_path / "source"), str(tmp_path / "ours"))
    argv = ["convert", *folders, "--aggregation", "grm", "--segment-size", "64"]
    assert cli.main([*argv, "--verify-logits"]) == 0
    assert "the logits are those of the source" in capsys.readouterr().out
    config = MCForCausalLM.from_pretrained(tmp_path / "ours").config
    assert (config.aggregation, config.segment_size) == ("grm", 64)
    assert cli.main(argv) == 1 and "exists already" in capsys.readouterr().err


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit.*inf"),
        ({"use_bias": True}, "use_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "gpt2"}, "model_type='gpt2'.*supported: mamba2"),
        ({"conv_kernel": 3}, "conv1d.*shape"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, source, values, words):
    change(tmp_path / "source", **values)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "source", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("old", "new", "words"), [("D", None, "lacks 1"), ("D", "E", "no rule")])
def test_missing_and_left_over_weights(tmp_path, source, old, new, words):
    file = tmp_path / "source" / "model.safetensors"
    weights = load_file(file)
    tensor = weights.pop(f"backbone.layers.1.mixer.{old}")
    if new:
        weights[f"backbone.layers.1.mixer.{new}"] = tensor
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("damage", ["truncated", "pickled", "missing shard"])
def test_bad_files_are_refused_and_nothing_runs(tmp_path, source, damage, capsys):
    folder = tmp_path / "source"
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "pickled":
        file.unlink()
        torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    else:
        file.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    words = {"truncated": "damaged or cut off", "pickled": "is not run", "missing shard": "model-1.safetensors"}
    with pytest.raises((ValueError, FileNotFoundError), match=words[damage]):
        convert(folder, tmp_path / "ours")
    assert "executed" not in capsys.readouterr().out and not (tmp_path / "ours").exists()


def test_plain_state_dicts_convert_too(tmp_path, source):
    folder = tmp_path / "source"
    weights = load_file(folder / "model.safetensors")
    convert(folder, tmp_path / "ours")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "again")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_verification_sees_a_difference(tmp_path, source):
    convert(tmp_path / "source", tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mixer.skip.bias"] += 0.01
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="differ"):
        verify_logits(Folder(tmp_path / "source"), tmp_path / "ours")
