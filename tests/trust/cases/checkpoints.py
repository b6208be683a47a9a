"""Checkpoints of somebody else: weights, indexes, pickles, configs, tokenizers."""

import itertools
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from harness import Case, Cases, accepted, command, expect, refused
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import metadata as parts
from transformers import AutoConfig

from helpers import build, small_config
from mc_transformers import MCConfig, MCForCausalLM, byte_tokenizer
from mc_transformers.cli import main as cli


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


def argv(name: str, folder: Path, output: Path) -> list:
    more = {
        "info": [],
        "generate": ["--prompt", "a", "--max-new-tokens", "1"],
        "bundle": [output, "--no-verify"],
        "convert": [output],
    }
    return [name, folder, *more[name]]


class Checkpoint:
    """A good checkpoint, and cases that spoil a copy of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, tokenizer = folder, byte_tokenizer(512)
        self.model = build(small_config("linear", vocab_size=len(tokenizer), aggregation="grm"))
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        command(*argv("bundle", folder, folder.parent / "bundled"))  # what a process does once is done before it forks

    def spoiled(self, spoil, name: str, words: list[str], allowed: bool = False) -> Case:
        """The command `name` on a copy that `spoil` has changed is refused, with the copy's name or one of `words`;
        or, if `allowed`, computes what the model of that config computes."""

        def case(place: Path) -> str:
            folder = Path(shutil.copytree(self.folder, place / "model"))
            spoil(folder)
            call = argv(name, folder, place / "out")
            if not allowed:
                return refused(call, [*words, folder] if words else [folder], place / "out")
            code, _ = command(*call)
            if code:
                shutil.rmtree(place / "out", ignore_errors=True)
                return refused(call, [*words, folder], place / "out")
            if name == "info":  # which computes nothing
                return "right"
            return self.same(folder, place / "out" if name == "convert" else folder)

        return case

    def same(self, folder: Path, loaded: Path) -> str:
        """What the command line loads is the model of the config and the weights in `folder`."""
        content = json.loads((folder / "config.json").read_text())
        expected = MCForCausalLM(MCConfig.from_dict(content)).eval()
        expected.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        ids = torch.arange(40)[None]
        with torch.no_grad():
            equal = torch.equal(cli.load_model(str(loaded)).float()(ids).logits, expected(ids).logits)
        expect(equal, "silent", "other logits than this config's")
        return "right"


# ------------------------------------------------------------------------------------------------------------- weights
def _bytes(change):
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _header(change):
    def of(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return _bytes(of)


def _tensors(change):
    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        save_file(change(weights) or weights, folder / WEIGHTS, {"format": "pt"})

    return spoil


def _put(change):
    return _tensors(lambda weights: weights.update({EMBEDDING: change(weights[EMBEDDING]).contiguous()}))


def weights(good: Checkpoint) -> Cases:
    damage = {
        "empty": _bytes(lambda data: b""),
        "four bytes": _bytes(lambda data: data[:4]),
        "a header of 2^60": _bytes(lambda data: struct.pack("<Q", 2**60) + data[8:]),
        "a header of none": _bytes(lambda data: bytes(8) + data[8:]),
        "no JSON": _bytes(lambda data: data[:8] + b"x" * 40 + data[48:]),
        "a byte less": _bytes(lambda data: data[:-1]),
        "half": _bytes(lambda data: data[: len(data) // 2]),
        "longer": _bytes(lambda data: data + bytes(8)),
        "overlapping": _header(lambda header: header[EMBEDDING].update(data_offsets=[4, 100])),
        "beyond the end": _header(lambda header: header[EMBEDDING].update(data_offsets=[0, 2**40])),
    }
    kinds = ["int64", "complex64", "float8_e4m3fn", "bool", "uint8", "int32"]
    shapes = {
        "transposed": _put(torch.t),
        "a row more": _put(lambda x: torch.cat([x, x[:1]])),
        "a row less": _put(lambda x: x[1:]),
        "a scalar": _put(lambda x: x[0, 0]),
    }
    names = {
        "one missing": _tensors(_without),
        "one more": _tensors(lambda found: found.update(x=torch.zeros(2))),
        "none": _tensors(lambda found: {"x": torch.zeros(1)}),
    }
    cases = {}
    for what, spoil in damage.items():
        for name in ("generate", "convert"):
            cases[f"{what}, {name}"] = good.spoiled(spoil, name, [])
    for kind in kinds:
        for name in ("generate", "bundle", "convert"):
            spoil = _put(lambda x, kind=kind: x.to(getattr(torch, kind)))
            cases[f"{kind}, {name}"] = good.spoiled(spoil, name, [EMBEDDING])
    for what, spoil in (shapes | names).items():
        for name in ("generate", "convert"):
            cases[f"{what}, {name}"] = good.spoiled(spoil, name, ["weight", "embed_tokens", "'x'"])
    for value in ("nan", "inf"):
        for name in ("generate", "bundle", "convert"):
            spoil = _put(lambda x, value=value: x.index_fill(0, torch.tensor(3), float(value)))
            cases[f"{value}, {name}"] = good.spoiled(spoil, name, [EMBEDDING])
    return cases


def _without(found: dict) -> dict:
    return {name: tensor for name, tensor in found.items() if name != "model.norm.weight"}


def index(good: Checkpoint) -> Cases:
    def shards(place, whole=None):
        def spoil(folder: Path) -> None:
            secret = folder.parent / "secret.safetensors"
            shutil.move(folder / WEIGHTS, secret)
            shutil.copy(secret, folder.parent / "x.safetensors")
            (folder / "link.safetensors").symlink_to(secret)
            (folder / "deep").symlink_to(folder.parent)
            (folder / "folder.safetensors").mkdir()
            os.mkfifo(folder / "pipe.safetensors")
            where = str(secret) if place == "absolute" else place
            text = json.dumps({"weight_map": dict.fromkeys(load_file(secret), where)})
            (folder / INDEX).write_text(text if whole is None else whole)

        return spoil

    places = ["../secret.safetensors", "absolute", "link.safetensors", "deep/x.safetensors", 5, None, "", ["a"]]
    places += ["missing.safetensors", "folder.safetensors", "pipe.safetensors"]
    spoils = {str(place): shards(place) for place in places}
    spoils |= {whole: shards(None, whole) for whole in ('{"weight_map": []}', "[1]", '{"weight_map": {"a"')}
    return {
        f"{what}, {name}": good.spoiled(spoil, name, [INDEX])
        for what, spoil in spoils.items()
        for name in ("generate", "convert")
    }


# ------------------------------------------------------------------------------------------------------------- pickles
class Call:
    """Pickles as a call."""

    def __init__(self, function, *args) -> None:
        self.what = function, args

    def __reduce__(self):
        return self.what


def _not_run(case: Case) -> Case:
    def marked(place: Path) -> str:
        result = case(place)
        expect(not (place / "marker").exists(), "ran code")
        return result

    return marked


def pickles(good: Checkpoint) -> Cases:
    def payload(kind: str, marker: Path) -> object:
        shell = Call(os.system, f"touch {marker}")
        return {
            "system": shell,
            "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
            "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
            "in a state dict": {EMBEDDING: torch.zeros(2), "x": shell},
            "two deep": {"model": {"x": shell}},
            "protocol 0": shell,
            "legacy": {"x": shell},
        }[kind]

    def spoil(kind: str):
        def write(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            path, what = folder / "pytorch_model.bin", payload(kind, folder.parent / "marker")
            if kind == "protocol 0":
                path.write_bytes(pickle.dumps(what, 0))
            else:
                torch.save(what, path, _use_new_zipfile_serialization=kind != "legacy")

        return write

    kinds = ["system", "exec", "eval", "in a state dict", "two deep", "protocol 0", "legacy"]
    return {
        f"{kind}, {name}": _not_run(good.spoiled(spoil(kind), name, []))
        for kind in kinds
        for name in ("generate", "convert")
    }


def sharded(good: Checkpoint) -> Cases:
    module = "torch.distributed.checkpoint.metadata"
    targets = [f"c{module}\n{name}\n" for name in ("MetadataIndex", "Metadata", "_MEM_FORMAT_ENCODING")]
    targets += ["ctorch\nSize\n", "ctorch\nfloat32\n", "cpathlib\nPosixPath\n", "ctorch.serialization\n_get_layout\n"]
    states = ["N}S'__hash__'\nNs\x86", "}S'planted'\nI1\ns"]
    contents = {
        f"{target.split()[1]} {number}": b"\x80\x02" + f"{target}{state}b.".encode("latin-1")
        for target, (number, state) in itertools.product(targets[:5], enumerate(states))
    }
    contents |= {target.split()[1]: b"\x80\x02" + f"{target}{states[1]}b.".encode("latin-1") for target in targets[5:]}
    contents["system"], contents["data cut off"] = None, b""

    def case(what: str) -> Case:
        def work(place: Path) -> str:
            folder, state = place / "model", {n: x.contiguous() for n, x in good.model.state_dict().items()}
            dcp.save(state, checkpoint_id=folder, no_dist=True)
            shutil.copy(good.folder / "config.json", folder)
            content = (
                contents[what]
                if contents[what] is not None
                else pickle.dumps(Call(os.system, f"touch {place}/marker"))
            )
            before = [dict(vars(kind)) for kind in (parts.MetadataIndex, parts.Metadata)]
            if what == "data cut off":
                data = next(folder.glob("*.distcp"))
                data.write_bytes(data.read_bytes()[:-400])
            else:
                (folder / ".metadata").write_bytes(content)
            result = refused(["convert", folder, place / "out"], [folder], place / "out")
            expect([dict(vars(kind)) for kind in (parts.MetadataIndex, parts.Metadata)] == before, "ran code")
            return result

        return _not_run(work)

    return {what: case(what) for what in contents}


# ------------------------------------------------------------------------------------------------------------- configs
COUNTS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
COUNTS += ["segment_size", "num_selected_segments", "summaries_per_segment", "memory_chunk_size", "memory_expansion"]
COUNTS += ["intermediate_size", "conv_kernel_size"]
NAMES = [
    "aggregation",
    "segmentation",
    "state_init",
    "memory",
    "gate_function",
    "segment_summary",
    "rope",
    "attention",
]


def _config(**values):
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(content))

    return spoil


def configs(good: Checkpoint) -> Cases:
    fields = [(name, value) for name in COUNTS for value in (0, -1, 10**30, "many", [1])]
    fields += [(name, value) for name in NAMES for value in ("nonsense", 5)]
    fields += [("rms_norm_eps", value) for value in (float("inf"), float("nan"), -1, "x", None, [])]
    fields += [("dtype", "load"), ("torch_dtype", 5), ("attn_implementation", "someone/kernel")]
    fields += [("quantization_config", [1]), ("architectures", 5), ("architectures", ["X"]), ("layer_types", ["x"])]
    fields += [("layer_types", 5), ("rope_parameters", 5), ("auto_map", {"AutoConfig": "evil.T"})]
    wholes = [b"[1]", b"null", b"", b'{"model_type": "mc", "hidden', b"\xff\xfe{}", None]
    commands, cases = itertools.cycle(["generate", "info", "convert"]), {}
    for name, value in fields:
        what = next(commands)
        cases[f"{name}={value!r}, {what}"] = good.spoiled(_config(**{name: value}), what, [name], allowed=True)
    for whole in wholes:

        def spoil(folder: Path, whole=whole) -> None:
            long = json.dumps({"model_type": "mc", "x": "y" * 10**7}).encode()[:-1]
            (folder / "config.json").write_bytes(long if whole is None else whole)

        what = next(commands)
        cases[f"{str(whole)[:20]}, {what}"] = good.spoiled(spoil, what, ["config.json"])
    return cases


def families(good: Checkpoint) -> Cases:
    def case(kind: str, field: str, value: object) -> Case:
        def work(place: Path) -> str:
            heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if kind == "mamba2" else {"num_attention_heads": 2}
            folder = place / "model"
            AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, vocab_size=64, **heads).save_pretrained(
                folder
            )
            _config(**{field: value})(folder)
            save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
            return refused(["convert", folder, place / "out"], [folder, field, "the weight 'x'"], place / "out")

        return work

    values = [("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("hidden_size", "wide")]
    found = {
        f"{kind} {name}={value}": case(kind, name, value)
        for kind in ("llama", "qwen3", "mamba2")
        for name, value in values
    }
    return found | {"llama vocab_size=None": case("llama", "vocab_size", None)}


# ---------------------------------------------------------------------------------------------------------- tokenizers
def tokenizers(good: Checkpoint) -> Cases:
    def evil(folder: Path, name: str, **values) -> None:
        (folder / "evil.py").write_text(f"open({str(folder.parent / 'marker')!r}, 'w')\nclass T: pass\n")
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def tokenizer_code(folder: Path) -> None:
        evil(folder, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "evil.T"]})

    def answered(case: Case) -> Case:
        def work(place: Path) -> str:
            import builtins

            builtins.input = lambda *_: "y"
            return case(place)

        return _not_run(work)

    def model_code(name: str) -> Case:
        def work(place: Path) -> str:
            folder = Path(shutil.copytree(good.folder, place / "model"))
            evil(folder, "config.json", auto_map={"AutoModelForCausalLM": "evil.T", "AutoConfig": "evil.T"})
            return accepted(argv(name, folder, place / "out"))

        return answered(work)

    def write(file: str, text: bytes):
        return lambda folder: (folder / file).write_bytes(text)

    def link(file: str):
        def spoil(folder: Path) -> None:
            (folder.parent / "secret").write_text('{"key": "of somebody"}')
            (folder / file).unlink(missing_ok=True)
            (folder / file).symlink_to(folder.parent / "secret")

        return spoil

    def beyond(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<beyond>"})
        (folder / "tokenizer.json").write_text(json.dumps(content))

    three, two = ("generate", "bundle", "convert"), ("bundle", "convert")
    cases = {f"code of a tokenizer, {n}": answered(good.spoiled(tokenizer_code, n, ["auto_map"])) for n in three}
    cases |= {f"code of a model, {name}": model_code(name) for name in three}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for text, name in itertools.product((b"[]", b'{"a": '), two):
            cases[f"{file} {text.decode()}, {name}"] = good.spoiled(write(file, text), name, [file])
    for file, name in itertools.product(("chat_template.jinja", "tokenizer.json"), two):
        cases[f"{file} leads out, {name}"] = good.spoiled(link(file), name, [file])
    cases |= {f"an id beyond, {name}": good.spoiled(beyond, name, ["<beyond>"]) for name in three}
    for name in two:
        cases[f"a template that is no text, {name}"] = good.spoiled(
            write("chat_template.jinja", b"\xff\xfe"), name, ["chat_template"]
        )
    for number, text in enumerate((b'{"max_length": "long"}', b'{"do_sample": [], "temperature": "hot"}')):
        cases[f"a generation config of a wrong kind {number}"] = good.spoiled(
            write("generation_config.json", text),
            "generate",
            ["generation_config", "max_length", "temperature", "do_sample"],
        )
    return cases


def groups(place: Path) -> dict[str, Cases]:
    good = Checkpoint(place / "good")
    return {
        "safetensors: damage, dtype, shape, NaN": weights(good),
        "index of shards, links, pipes": index(good),
        "pickled weights with a payload": pickles(good),
        "torch.distributed.checkpoint": sharded(good),
        "config.json of the family": configs(good),
        "config.json of other families": families(good),
        "tokenizer, generation config, code": tokenizers(good),
    }
