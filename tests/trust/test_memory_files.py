"""Memory files: what no cache of the model can hold is refused with one kind of error, before it is allocated, and
whoever is killed or writes at the same time leaves the old or the new file.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import build, small_config, tokens
from mc_transformers import MCCache
from mc_transformers.modeling_mc import fingerprint as fingerprints
from mc_transformers.modeling_mc.memory_file import FILE, LEFT_OVER, PREFIX, _checksum


Tensors, Meta = dict[str, torch.Tensor], dict
KINDS = {
    "unbounded": ({"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2}, None),
    "least_read": ({"max_cached_segments": 2, "cache_eviction": "least_read", "aggregation": "grm"}, None),
    "int8": (
        {"layer_types": ["sliding_attention", "memory_caching"], "num_hidden_layers": 2, "sliding_window": 5},
        torch.int8,
    ),
    "int4": ({"max_cached_segments": 2}, "int4"),
}


class Saved:
    """A model, its memory in a folder, and the file's parts."""

    def __init__(self, folder: Path, kind: str) -> None:
        fields, dtype = KINDS[kind]
        self.folder, self.path, self.model = folder, folder / FILE, build(small_config(**fields))
        self.cache = MCCache(config=self.model.config, state_dtype=dtype)
        with torch.no_grad():
            self.model(tokens(2, 29), cache=self.cache)
        self.cache.save_pretrained(folder, self.model)
        self.data = self.path.read_bytes()

    def parts(self) -> tuple[Tensors, Meta]:
        self.path.write_bytes(self.data)
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["mc_memory"])

    def load(self) -> MCCache:
        return MCCache.from_pretrained(self.folder, self.model)

    def same(self, cache: MCCache) -> bool:
        pairs = zip(cache.memory_layers, self.cache.memory_layers, strict=True)
        return all(
            mine.num_tokens == layer.num_tokens
            and all(torch.equal(mine.tensors[name], tensor) for name, tensor in layer.tensors.items())
            for mine, layer in pairs
        )

    def forged(self, tensors: Tensors, meta: Meta) -> None:
        """A file with these parts, and the checksum that belongs to them."""
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        try:
            meta["checksum"] = _checksum(tensors, meta)
        except (TypeError, ValueError):
            meta["checksum"] = ""
        save_file(tensors, self.path, metadata={"format": "pt", "mc_memory": json.dumps(meta)})


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("memory"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Saved:
    return Saved(tmp_path_factory.mktemp("memory"), "unbounded")


# ------------------------------------------------------------------------------------------------------------ contents
def damaged_bytes(data: bytes, kind: str, rng: random.Random) -> bytes:
    place, header = rng.randrange(len(data)), 8 + int.from_bytes(data[:8], "little")
    if kind == "bit":
        place = rng.choice([place, rng.randrange(header)])
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "longer":
        return data + bytes(rng.randrange(1, 40))
    if kind == "zeros":
        return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    size = rng.randrange(1, len(data) // 2)  # swapped
    return data[size : 2 * size] + data[:size] + data[2 * size :]


@given(kind=st.sampled_from(["bit", "cut", "longer", "zeros", "swapped"]), seed=st.integers(0, 2**32))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_never_silent(saved, kind, seed):
    data = damaged_bytes(saved.data, kind, random.Random(seed))
    saved.path.write_bytes(data)
    try:
        cache = saved.load()
    except ValueError as error:
        assert str(saved.path) in str(error) and len(str(error)) < 1500
    else:
        assert saved.same(cache)  # for example in the name of the framework


def put(tensors: Tensors, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors[name] = value(tensors[name])


ODD = [None, -1, 2**70, 1.5, float("nan"), "", "x" * 10**5, [], {}, [[]], True, 10**9]


def forge(tensors: Tensors, meta: Meta, rng: random.Random) -> None:
    """One change that no cache of the model can have."""
    name, layer = rng.choice(sorted(tensors)), rng.choice(meta["layers"])
    tensor = tensors[name]
    what = rng.randrange(9)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[rng.choice(["x", "0.x", "9.position", "0", ".", name + ".0"])] = torch.zeros(2)
    elif what == 2:
        tensors[name] = tensor.repeat_interleave(3, rng.randrange(tensor.ndim))
    elif what == 3:
        tensors[name] = tensor.to(rng.choice([torch.int32, torch.bool, torch.uint8, torch.complex64]))
    elif what == 4 and tensor.is_floating_point():
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf")])
    elif what == 5:
        key = rng.choice(sorted(meta.keys() - {"checksum"}))
        meta[key] = rng.choice([x for x in ODD if x != meta[key]])
    elif what == 6:
        key = "num_tokens" if "num_tokens" in layer else "signature" if "signature" in layer else None
        meta["layers"] = [{**x, key: rng.choice(ODD)} for x in meta["layers"]] if key else []
    elif what == 7:
        meta.pop(rng.choice(["layers", "state_dtype", "fingerprint", "version"]))
    else:
        position = next(name for name in sorted(tensors) if name.endswith(".position"))
        tensors[position] = torch.tensor([29, rng.choice([-1, 30, 2**62, -(2**63)])])


@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_forged_files_are_refused(saved, seed):
    tensors, meta = saved.parts()
    forge(tensors, meta, random.Random(seed))
    saved.forged(tensors, meta)
    about = meta.get("layers")
    if isinstance(about, list) and about and all(isinstance(x, dict) and x.get("num_tokens") == 10**9 for x in about):
        return  # a bounded memory can have read as many
    with pytest.raises(ValueError) as raised:
        saved.load()
    assert str(saved.path) in str(raised.value) and len(str(raised.value)) < 1500


CASES: dict[str, Callable[[Tensors, Meta], None]] = {
    "a number of tokens that would ask for 64 GB": lambda t, m: m["layers"][0].update(num_tokens=10**9),
    "a position beyond": lambda t, m: put(t, "0.position", lambda x: x + 1),
    "a negative position": lambda t, m: put(t, "0.position", lambda x: x - 30),
    "a position between two segments": lambda t, m: put(t, "0.position", lambda x: x - 5),
    "a slot too few": lambda t, m: put(t, "0.kept.0", lambda x: x[:, :-1]),
    "descriptors without a slot": lambda t, m: put(t, "0.summaries", lambda x: x[:, :-1]),
    "two slots too many": lambda t, m: put(t, "0.kept.0", lambda x: torch.cat([x, x[:, :2]], 1)),
    "half states": lambda t, m: put(t, "0.state.0", torch.Tensor.half),
    "int8 without its scale": lambda t, m: put(t, "0.kept.0", lambda x: x.to(torch.int8)),
    "a row too many": lambda t, m: put(t, "0.state.0", lambda x: x[[0, 1, 1]]),
    "keys of fewer tokens": lambda t, m: put(t, "1.keys", lambda x: x[:, :, 1:]),
    "another signature": lambda t, m: m["layers"][0]["signature"].update(segment_size=4),
    "an unknown dtype": lambda t, m: m.update(state_dtype="float8"),
    "a newer version": lambda t, m: m.update(version=3),
    "not finite": lambda t, m: put(t, "1.values", lambda x: x / 0),
}


@pytest.mark.parametrize("case", CASES)
def test_forged_file(one, case):
    tensors, meta = one.parts()
    CASES[case](tensors, meta)
    one.forged(tensors, meta)
    with pytest.raises(ValueError, match=FILE):
        one.load()
    assert one.same(Saved.load(one)) if one.path.write_bytes(one.data) else False  # and the right one is believed


@pytest.mark.parametrize("name,value", [("segment", 3), ("segment", -2), ("segment", 0), ("received", -1.0)])
def test_counters_of_a_bounded_memory(tmp_path, name, value):
    saved = Saved(tmp_path, "least_read")
    tensors, meta = saved.parts()
    tensors[f"0.{name}"][:] = value
    saved.forged(tensors, meta)
    with pytest.raises(ValueError, match=name):
        saved.load()


@torch.no_grad()
def test_a_memory_saved_while_drafts_are_recorded(tmp_path):
    """Attention with a window keeps more meanwhile, which a loaded cache has no use for."""
    saved = Saved(tmp_path, "int8")
    saved.cache.activate_past_recording()
    saved.model(tokens(2, 12), cache=saved.cache)
    saved.cache.save_pretrained(tmp_path)
    logits = [saved.model(tokens(2, 3), cache=cache).logits for cache in (saved.load(), saved.cache)]
    assert torch.equal(*logits)


def test_what_is_not_finite_is_not_saved(one):
    cache = MCCache.from_pretrained(one.folder, one.model)
    cache.layers[0].tensors["state.0"] = cache.layers[0].tensors["state.0"] / 0
    with pytest.raises(ValueError, match="not finite"):
        cache.save_pretrained(one.folder)
    assert one.same(one.load())


# --------------------------------------------------------------------------------------------------------- fingerprint
@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_every_value_of_a_model_counts(one, seed):
    rng = random.Random(seed)
    parameter = rng.choice(list(one.model.model.parameters()))
    place, before = rng.randrange(parameter.numel()), fingerprints.fingerprint(one.model.model)
    with torch.no_grad():
        old = parameter.view(-1)[place].clone()
        parameter.view(-1)[place] = torch.nextafter(old, torch.tensor(9.0))
        with pytest.raises(ValueError, match="another model"):
            one.load()
        parameter.view(-1)[place] = old
    assert fingerprints.fingerprint(one.model.model) == before


@pytest.mark.parametrize("number", [0, 2, 5])
def test_changes_that_torch_does_not_count(one, number):
    """Through `.data` parameters have no versions; one value is enough, and so are two that change places."""
    parameter = list(one.model.model.parameters())[number].data.view(-1)
    kept = parameter.clone()
    parameter[len(parameter) // 2 + 1] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        one.load()
    parameter.copy_(kept)
    parameter[[0, -1]] = kept[[-1, 0]]
    with pytest.raises(ValueError, match="another model"):
        one.load()
    parameter.copy_(kept)
    assert one.same(one.load())


def test_parameters_of_any_stride(one):
    """A single value may stand in memory in any stride; of numbers, only the values count."""
    model = build(one.model.config).model
    before = fingerprints.fingerprint(model)
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        wide = parameter.data.new_zeros(*parameter.shape, 3)
        wide[..., 1] = parameter.data
        setattr(model.get_submodule(parent), last, torch.nn.Parameter(wide[..., 1]))
    assert not next(model.parameters()).is_contiguous()
    assert fingerprints.fingerprint(model) == before
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        one_value = torch.ones(3, dtype=dtype).as_strided((1,), (5,), 1)
        assert fingerprints._bytes(one_value) == fingerprints._bytes(torch.ones(1, dtype=dtype))


def test_weights_are_hashed_once(one, monkeypatch):
    model = one.model.model
    calls, real = [], fingerprints._bytes
    monkeypatch.setattr(fingerprints, "_bytes", lambda piece: calls.append(1) or real(piece))
    fingerprints._known.clear()
    before = [fingerprints.fingerprint(model) for _ in range(3)]
    num = len(list(model.parameters()))
    assert len(calls) == num and len(set(before)) == 1
    assert fingerprints.fingerprint(build(one.model.config).model.double()) == before[0]  # exactly the same numbers
    calls.clear()
    weight = next(model.parameters())
    weight.data = weight.data.clone()
    assert fingerprints.fingerprint(model) == before[0] and len(calls) == num


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "meta"])
def test_models_that_no_memory_belongs_to(one, model):
    model = build(one.model.config).to("meta") if model == "meta" else model
    for use in (one.cache.save_pretrained, MCCache.from_pretrained):
        with pytest.raises(ValueError, match="`model`"):
            use(one.folder, model)


# ------------------------------------------------------------------------------------------------- writers and readers
def in_a_fork(work: Callable[[], None]):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_two_processes_save_while_a_third_reads(tmp_path):
    saved = Saved(tmp_path, "unbounded")

    def save() -> None:
        for _ in range(50):
            saved.cache.save_pretrained(tmp_path, saved.model)

    writers = [in_a_fork(save) for _ in range(2)]
    while any(writer.is_alive() for writer in writers):
        assert saved.same(saved.load())
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0] and os.listdir(tmp_path) == [FILE]


def test_a_killed_save_leaves_the_file_and_what_the_next_day_cleans(tmp_path):
    saved, rng = Saved(tmp_path, "unbounded"), random.Random(0)

    def save() -> None:
        while True:
            saved.cache.save_pretrained(tmp_path, saved.model)

    for _ in range(6):
        process = in_a_fork(save)
        time.sleep(0.05 + rng.random() / 20)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert saved.same(saved.load())
    (tmp_path / f"{PREFIX}killed").mkdir()
    (tmp_path / f"{PREFIX}killed" / ".tmpabc").write_bytes(b"half")
    (tmp_path / ".tmpmine").write_text("a user's")
    for path in tmp_path.iterdir():
        assert path.name in (FILE, ".tmpmine") or path.name.startswith(PREFIX)
    saved.cache.save_pretrained(tmp_path, saved.model)
    assert (tmp_path / f"{PREFIX}killed").exists()  # perhaps somebody writes there
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - LEFT_OVER - 60,) * 2)
    saved.cache.save_pretrained(tmp_path, saved.model)
    assert sorted(os.listdir(tmp_path)) == [FILE, ".tmpmine"][::-1]


@pytest.mark.parametrize("room", [0, 100, 3000, 10000])
def test_a_full_disk(tmp_path, room):
    """The system refuses to make a file larger than `room` bytes, as a full disk does at some byte."""
    saved = Saved(tmp_path, "unbounded")
    assert len(saved.data) > 10000

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            saved.cache.save_pretrained(tmp_path)
        except OSError as error:
            os._exit(7 if FILE in str(error) else 8)

    process = in_a_fork(save)
    process.join(60)
    assert process.exitcode == 7
    assert saved.same(saved.load()) and os.listdir(tmp_path) == [FILE]


def test_files_and_folders_without_permission(tmp_path):
    saved = Saved(tmp_path / "memory", "unbounded")
    saved.path.chmod(0)
    saved.folder.chmod(0o555)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=FILE):
            saved.load()
        with pytest.raises(PermissionError):
            saved.cache.save_pretrained(saved.folder, saved.model)
    finally:
        if root:
            os.seteuid(0)
        saved.folder.chmod(0o755)
    saved.path.unlink()
    saved.path.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no"):
        saved.load()
