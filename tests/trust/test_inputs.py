"""Checkpoints of somebody else: no code of theirs runs, no file outside of their folder is read, and whatever is
damaged ends in one line that names it.
"""

import io
import json
import pickle
import re
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as parts
from transformers import AutoConfig

from helpers import build, small_config
from mc_transformers import MCConfig, byte_tokenizer
from mc_transformers.cli import main as cli
from mc_transformers.conversion.sharded import read_sharded
from mc_transformers.hub import inputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = byte_tokenizer(512)
    build(small_config("linear", vocab_size=len(tokenizer), aggregation="grm")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


COMMANDS = {
    "info": lambda folder, output: ["info", folder],
    "generate": lambda folder, output: ["generate", folder, "--prompt", "a", "--max-new-tokens", "1"],
    "bundle": lambda folder, output: ["bundle", folder, output, "--no-verify"],
    "convert": lambda folder, output: ["convert", folder, output],
}


def call(name: str, folder: Path, output: Path) -> str:
    """The line on which a command fails, "" if it does not; there is no output then."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        code = cli.main(list(map(str, COMMANDS[name](folder, output))))
    if code == 0:
        return ""
    err = err.getvalue()
    line = err.rstrip("\n").splitlines()[-1]
    assert code == 1 and not output.exists(), err
    assert line.startswith(f"mc-transformers {name}: error: ") and len(line) < 2500, line[:3000]
    assert not re.search(r"error: \w+(Error|Exception): |Traceback", line), line
    return line


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --------------------------------------------------------------------------------------------------------------- code
def test_no_code_of_a_checkpoint_runs(copy, tmp_path, monkeypatch):
    """A tokenizer of its own, and somebody who answers every question with yes."""
    marker = tmp_path / "it ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    change(copy / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "evil.T"]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name in ("generate", "bundle", "convert"):
        assert "auto_map" in call(name, copy, tmp_path / "out")
    change(copy / "tokenizer_config.json", auto_map=None)
    change(copy / "config.json", auto_map={"AutoModelForCausalLM": "evil.T", "AutoConfig": "evil.T"})
    for name in ("info", "generate", "bundle", "convert"):
        call(name, copy, tmp_path / f"out-{name}")
    change(copy / "config.json", attn_implementation="someone/kernel")
    for name in ("info", "generate", "bundle", "convert"):
        assert "attn_implementation" in call(name, copy, tmp_path / "out")
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------- files elsewhere
@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "absolute", "link.safetensors", "deep/x.safetensors", 5, None]
)
def test_shards_lie_in_their_folder(copy, tmp_path, place):
    shutil.move(copy / "model.safetensors", tmp_path / "secret.safetensors")
    if place == "absolute":
        place = str(tmp_path / "secret.safetensors")
    (copy / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (copy / "deep").symlink_to(tmp_path)
    shutil.copy(tmp_path / "secret.safetensors", tmp_path / "x.safetensors")
    names = list(load_file(tmp_path / "secret.safetensors"))
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    for name in ("generate", "bundle", "convert"):
        line = call(name, copy, tmp_path / "out")
        assert "outside of its folder" in line and "model.safetensors.index.json" in line


def test_links_of_the_hubs_cache_are_followed(checkpoint, tmp_path):
    """`snapshots/REVISION/NAME -> ../../blobs/HASH`, with shards, under a subfolder too."""
    cache = tmp_path / "models--me--model"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(p for p in checkpoint.iterdir() if p.is_file())):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("generate", "bundle", "convert"):
        assert call(name, snapshot, tmp_path / f"out-{name}") == ""
    assert inputs.is_inside(snapshot, "config.json") and not inputs.is_inside(cache, "../other/config.json")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", f"{inputs.CHAT_TEMPLATES}/tools.jinja"])
def test_copied_files_are_no_links_that_lead_out(copy, tmp_path, name):
    (tmp_path / "secret").write_text('{"key": "of somebody"}')
    (copy / name).unlink(missing_ok=True)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).symlink_to(tmp_path / "secret")
    for command in ("convert", "bundle"):
        assert "outside of its folder" in call(command, copy, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("kind", ["int64", "complex64", "float8_e4m3fn", "bool", "nan", "inf"])
def test_weights_of_another_kind_are_named(copy, tmp_path, kind):
    weights = load_file(copy / "model.safetensors")
    name = "model.embed_tokens.weight"
    if kind in ("nan", "inf"):
        weights[name][3, 1] = float(kind)
    else:
        weights[name] = weights[name].to(getattr(torch, kind))
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    for command in ("generate", "bundle", "convert"):
        line = call(command, copy, tmp_path / "out")
        assert name in line and ("NaN or infinite" in line if kind in ("nan", "inf") else "allowed: fp32" in line)


class Attribute:
    """Pickles as an index whose state is set on a class."""

    def __reduce__(self):
        return (list, (), (None, {"__hash__": None}))


def test_an_index_sets_no_attributes_of_classes(tmp_path):
    good = tmp_path / "good"
    dcp.save({"a": torch.arange(4.0)}, checkpoint_id=good, no_dist=True)
    assert [name for name, _ in read_sharded(good)] == ["a"]
    kept = dict(vars(parts.MetadataIndex))
    names = ["MetadataIndex", "Metadata", "_MEM_FORMAT_ENCODING"]
    targets = [f"ctorch.distributed.checkpoint.metadata\n{name}\n" for name in names]
    targets += ["ctorch\nSize\n", "ctorch\nfloat32\n", "cpathlib\nPosixPath\n", "ctorch.serialization\n_get_layout\n"]
    targets.append("ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n(I0\ntR")
    for number, target in enumerate(targets):
        bad = tmp_path / str(number)
        shutil.copytree(good, bad)
        for state in ("N}S'__hash__'\nNs\x86", "}S'planted'\nI1\ns"):  # slots, and a dictionary
            (bad / ".metadata").write_bytes(b"\x80\x02" + f"{target}{state}b.".encode("latin-1"))
            with pytest.raises(ValueError, match="is not an index|is no index"):
                list(read_sharded(bad))
    assert dict(vars(parts.MetadataIndex)) == kept and [name for name, _ in read_sharded(good)] == ["a"]
    (bad / ".metadata").write_bytes(pickle.dumps(Attribute()))
    with pytest.raises(ValueError, match="damaged"):
        list(read_sharded(bad))


# ------------------------------------------------------------------------------------------------------------- configs
HUGE = st.sampled_from([10**7, 10**9, 2**31, 2**62, 2**63, 10**30])
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    HUGE,
    st.floats(),
    st.sampled_from(["", "load", "x" * 10**6, "../..", "hf\nline"]),
    st.just([]),
    st.lists(st.integers(0, 2), max_size=3),
    st.just({}),
    st.dictionaries(st.sampled_from(["a", "rope_type", "rope_theta"]), st.integers(-1, 1), max_size=2),
)
FIELDS = sorted(
    {*MCConfig.__dataclass_fields__, "torch_dtype", "auto_map", "quantization_config"} - {"transformers_version"}
)


@given(data=st.data())
def test_any_config_ends_in_one_line_and_soon(checkpoint, tmp_path_factory, data):
    folder, output = tmp_path_factory.mktemp("config"), Path("nowhere")
    content = json.loads((checkpoint / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True), "fields"):
        content[name] = data.draw(ODD, name)
    (folder / "config.json").write_text(json.dumps(content))
    start = time.perf_counter()
    line = call("info", folder, output)
    assert time.perf_counter() - start < 10, (content, line)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("summaries_per_segment", 10**9),
        ("sliding_window", 2**60),
        ("hidden_size", 10**12),
        ("vocab_size", 2**62),
    ],
)
def test_a_config_is_bounded_before_a_model_is_built(copy, tmp_path, field, value):
    change(copy / "config.json", **{field: value}, layer_types=None, mc_layer_types=None, segment_size=10**9)
    for name in COMMANDS:
        start = time.perf_counter()
        line = call(name, copy, tmp_path / "out")
        assert f"`{field}`={value}" in line and "allowed: an integer <= " in line
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mamba2"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("hidden_size", "wide"), ("hidden_size", None)],
)
def test_configs_of_other_families(tmp_path, kind, field, value):
    folder = tmp_path / "model"
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "mamba2" else {"num_attention_heads": 2}
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, vocab_size=64, **heads)
    config.save_pretrained(folder)
    change(folder / "config.json", **{field: value})
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    start = time.perf_counter()
    line = call("convert", folder, tmp_path / "out")
    assert str(folder) in line or field in line or kind == "mamba2" and "the weight 'x'" in line
    assert time.perf_counter() - start < 5


# ------------------------------------------------------------------------------------------------------- damaged files
DAMAGED = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "model.safetensors")
CONTENTS = st.one_of(
    st.sampled_from([b"", b"[1]", b"null", b"5", b'"x"', b"{}", b"[]", b"\xff\xfe", b"[" * 10**5, b"{" * 100]),
    st.binary(max_size=40),
)


def test_a_damaged_generation_config_is_named(copy, tmp_path):
    (copy / "generation_config.json").write_text("[1]")
    for name in ("generate", "convert", "bundle"):
        assert "generation_config.json does not hold a dictionary" in call(name, copy, tmp_path / "out")


@given(data=st.data())
def test_any_damaged_file_ends_in_one_line(checkpoint, tmp_path_factory, data):
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("damaged") / "model"))
    path = folder / data.draw(st.sampled_from(DAMAGED), "file")
    content = path.read_bytes() if path.exists() else b"{}"
    how = data.draw(st.sampled_from(["replaced", "cut", "a byte", "inserted"]), "how")
    where = data.draw(st.integers(0, len(content)), "where")
    if how == "replaced":
        content = data.draw(CONTENTS, "content")
    elif how == "cut":
        content = content[:where]
    elif how == "a byte":
        content = content[:where] + bytes([data.draw(st.integers(0, 255), "byte")]) + content[where + 1 :]
    else:
        content = content[:where] + data.draw(st.binary(min_size=1, max_size=8), "bytes") + content[where:]
    path.write_bytes(content)
    name = data.draw(st.sampled_from(["generate", "convert", "bundle"]), "command")
    start = time.perf_counter()
    line = call(name, folder, folder.with_name("out"))
    if path.suffix == ".json" and path.exists() and how == "replaced":
        try:
            good = isinstance(json.loads(content), dict)
        except (ValueError, RecursionError):
            good = False
        assert good or path.name in line, line
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["generate", "bundle"])
def test_a_weight_of_another_shape_is_named(copy, tmp_path, name):
    weights = load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][1:].clone()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    line = call(name, copy, tmp_path / "out")
    assert "1 mismatched keys" in line and "model.embed_tokens.weight" in line


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("generation_config.json", "max_length", "long"),
        ("generation_config.json", "temperature", []),
        ("config.json", "architectures", 5),
        ("config.json", "segment_size", 10**30),
    ],
)
def test_values_of_a_wrong_kind_are_named(copy, tmp_path, file, field, value):
    change(copy / file, **{field: value})
    for name in ("generate", "bundle", "convert"):
        if (field, name) != ("architectures", "convert"):  # which writes its own
            assert f"`{field}`" in call(name, copy, tmp_path / "out")


def test_long_values_are_cut(copy, tmp_path, capsys):
    change(copy / "config.json", aggregation="x" * 10**7)
    for name in COMMANDS:
        assert "aggregation" in call(name, copy, tmp_path / "out")
    with pytest.raises(SystemExit):
        cli.main(["info", "--" + "x" * 10**6])
    assert len(capsys.readouterr().err) < 5000


# ----------------------------------------------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize("place", ["added", "vocabulary"])
def test_a_token_that_the_embedding_has_no_row_for(copy, tmp_path, place):
    content = json.loads((copy / "tokenizer.json").read_text())
    if place == "added":
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 258, "content": "<beyond>"})
    else:
        content["model"]["vocab"]["<beyond>"] = 10**6
    (copy / "tokenizer.json").write_text(json.dumps(content))
    for name in ("generate", "bundle", "convert"):
        line = call(name, copy, tmp_path / "out")
        assert "'<beyond>'" in line and "`vocab_size`" in line and "258 rows" in line


def test_a_vocabulary_is_read_from_every_kind_of_file(tmp_path):
    assert inputs.read_vocabulary(tmp_path) == {}
    (tmp_path / "vocab.json").write_text('{"a": 0, "odd": null, "half": 0.5}')
    (tmp_path / "added_tokens.json").write_text('{"b": 5}')
    unigram = {"model": {"type": "Unigram", "vocab": [["c", 0.0], [], 7, ["d", -1.0]]}, "added_tokens": [5, {"id": 8}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert inputs.read_vocabulary(tmp_path) == {"a": 0, "c": 0, "d": 3, "None": 8, "b": 5}
    (tmp_path / "tokenizer.json").write_text('{"model": [], "added_tokens": {"x": 1}}')
    assert inputs.read_vocabulary(tmp_path) == {"a": 0, "b": 5}
