"""Llama, Qwen2 and Qwen3 of Transformers: the same model with all attention, a trainable one with memory layers."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conversion_sources import IDS, SIZES, TOKENS, make_kind, train
from mc_transformers import MCForCausalLM
from mc_transformers.cli import main as cli
from mc_transformers.conversion.convert import convert
from mc_transformers.hub.flat import flat_files


SMALL = SIZES | {
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SCALED = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, SMALL),
    "llama biased": (LlamaForCausalLM, LlamaConfig, SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama scaled": (LlamaForCausalLM, LlamaConfig, SMALL | {"rope_parameters": SCALED, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SMALL),
}


@pytest.fixture
def make(tmp_path):
    return partial(make_kind, KINDS, tmp_path / "source")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_all_attention_is_the_source(tmp_path, make, kind):
    theirs = make(kind)
    convert(tmp_path / "source", tmp_path / "ours", verify=True)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (ours(IDS).logits - theirs(IDS).logits).abs().max() < 1e-4
    assert torch.equal(ours.generate(IDS, **TOKENS), theirs.generate(IDS, **TOKENS))


@pytest.mark.parametrize("memory", ["gated_linear", "gated_delta", "swla"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_chosen_layers_keep_what_they_can(tmp_path, make, kind, memory, caplog):
    theirs = make(kind)
    fields = {"memory": memory, "aggregation": "grm", "segment_size": 8}
    convert(tmp_path / "source", tmp_path / "ours", layers=[1, 3], **fields)
    assert "within the vocabulary" not in caplog.text
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert [kind == "memory_caching" for kind in ours.config.layer_types] == [False, True, False, True]
    with torch.no_grad():  # up to the first memory layer nothing has changed
        a, b = (model(IDS, output_hidden_states=True).hidden_states for model in (ours, theirs))
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-4)
        assert (a[2] - b[2]).abs().max() > 1e-3
    mixer, attention = ours.model.layers[1].mixer, theirs.model.layers[1].self_attn
    for name in ("q_proj", "o_proj"):
        for new, old in zip(getattr(mixer, name).parameters(), getattr(attention, name).parameters(), strict=True):
            assert torch.equal(new, old)
    for name in ("k_proj", "v_proj"):  # heads 0 and 1 share the first
        for new, old in zip(getattr(mixer, name).parameters(), getattr(attention, name).parameters(), strict=True):
            assert torch.equal(new.unflatten(0, (4, -1)), old.unflatten(0, (2, -1))[[0, 0, 1, 1]])
    fresh = MCForCausalLM(ours.config).model.layers[1].mixer
    assert torch.equal(mixer.a_bias.bias, fresh.a_bias.bias) and mixer.u_proj.weight.abs().max() == 0
    assert not torch.equal(mixer.a_proj.weight, ours.model.layers[3].mixer.a_proj.weight)
    losses = train(ours)
    assert losses[-1] < losses[0]


def add_weights(folder, new: dict) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | new, folder / "model.safetensors", {"format": "pt"})


def test_constants_of_old_files_are_left_out(tmp_path, make):
    make("llama")
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    add_weights(tmp_path / "source", {name: torch.ones(4) for name in names})
    convert(tmp_path / "source", tmp_path / "ours", verify=True)


def test_quantised_weights_are_refused(tmp_path, make):
    weight = make("llama").model.layers[1].mlp.up_proj.weight
    for dtype in (torch.int8, torch.float8_e4m3fn):
        add_weights(tmp_path / "source", {"model.layers.1.mlp.up_proj.weight": weight.to(dtype)})
        with pytest.raises(ValueError, match="up_proj.*quantised"):
            convert(tmp_path / "source", tmp_path / "ours")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="quantization_config"):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_source_is_never_replaced(tmp_path, make, monkeypatch):
    make("llama")
    before = (tmp_path / "source" / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    for output in ("source", "./source/../source", tmp_path, "."):
        with pytest.raises(ValueError, match="would replace"):
            convert(tmp_path / "source", output, overwrite=True)
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == before


def test_tokenizer_and_code_come_along(tmp_path, make):
    make("llama")
    templates = tmp_path / "source" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("tools")
    for name in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / "source" / name).write_text(json.dumps({"name": name}))
    convert(tmp_path / "source", tmp_path / "ours")
    for path in ("chat_template.jinja", "tokenizer.json", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "ours" / path).read_text() == (tmp_path / "source" / path).read_text()
    assert "modeling_mc.MCForCausalLM" in (tmp_path / "ours" / "config.json").read_text()
    assert set(flat_files()) <= {file.name for file in (tmp_path / "ours").iterdir()}


def test_both_names_of_qwen_are_understood(tmp_path, make):
    make("qwen2")
    for name in ("qwen", "llama"):
        convert(tmp_path / "source", tmp_path / name, source=name, layers=[0])
    with pytest.raises(ValueError, match="found model_type='qwen2'.*--from mamba2"):
        convert(tmp_path / "source", tmp_path / "ours", source="mamba2")


def test_command_line(tmp_path, make, capsys):
    make("llama")
    argv = ["convert", str(tmp_path / "source"), str(tmp_path / "ours"), "--layers", "0,2", "--memory", "gated_delta"]
    assert cli.main([*argv, "--verify-logits"]) == 1 and "is not the source" in capsys.readouterr().err
    for option in (["--memory", "dla"], ["--dtype", "bfloat16", "--verify-logits"]):  # without layers, or rounded
        assert cli.main([*argv[:3], *option]) == 1
        assert option[0].strip("-") in capsys.readouterr().err and not (tmp_path / "ours").exists()
    assert cli.main([*argv, "--aggregation", "ssc"]) == 0
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert "model.layers.0.mixer.memory.A_log.bias" in weights and "model.layers.1.self_attn.q_proj.weight" in weights


@pytest.mark.parametrize(
    ("kind", "fields", "layers", "words"),
    [
        ("llama biased", {}, [0], "attention_bias"),
        ("llama", {}, [4], "layers=\\[4\\].*0 to 3"),
        ("llama", {"hidden_act": "gelu"}, None, "hidden_act"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, None, "sliding_att"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, None, "sliding_att"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, make, kind, fields, layers, words):
    make(kind, **fields)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "source", tmp_path / "ours", layers=layers)
    assert not (tmp_path / "ours").exists()
