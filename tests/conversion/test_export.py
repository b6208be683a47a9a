"""`mc-transformers export`: what two graphs of fixed size answer is what the model answers, without torch.

`make test-export` runs the whole matrix, and int8 weights of a trained model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import mc_transformers as mc
from helpers import build, small_config
from mc_transformers.cli.main import main
from mc_transformers.conversion.export import graph, limits
from mc_transformers.kernels.shared.inlined import Inlined, solve_unit_lower
from mc_transformers.kernels.write.linear import linear_write


ROOT = Path(__file__).parents[2]
CHAT, TRAINED = ROOT / "examples" / "onnx_chat", ROOT / "model_cards" / "checkpoints" / "python-source"
MISSING = [name for name in (*limits.NEEDED["onnx"], "transformers.exporters") if find_spec(name) is None]
with_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: make test-export")
every = pytest.mark.skipif(not os.environ.get("MC_EXPORT"), reason="minutes: make test-export")
PROMPT, NEW, PIECE, ROOM = 37, 50, 12, 96  # eleven segments of 8 tokens
MATRIX = [
    {"memory": memory, "aggregation": aggregation, "max_cached_segments": bound}
    for memory in ("gated_linear", "swla", "gated_delta", "titans")
    for aggregation, bound in (("none", None), ("grm", None), ("ssc", None), ("ssc", 3), ("grm", 3))
    if (memory, aggregation) != ("titans", "none")  # amplifies rounding: docs/export.md
]
OTHERS = [
    {"memory": "rwkv7", "aggregation": "grm"},
    {"memory": "dla", "aggregation": "soup"},
    {"memory": "retention", "aggregation": "residual"},
    {"memory": "linear", "aggregation": "mean"},
    {"memory": "gated_linear", "aggregation": "grm", "state_init": "checkpoint"},
    {"memory": "gated_delta", "aggregation": "grm", "online_memory": "running"},
    {"memory": "gated_linear", "aggregation": "ssc", "route_sharing": "model", "num_hidden_layers": 2},
    {"memory": "gated_linear", "aggregation": "grm", "summaries_per_segment": 2, "gate_function": "sigmoid"},
]


def without_torch(code: str, *arguments: str) -> str:
    """What a program prints that cannot import torch, Transformers or this package."""
    blocked = "import sys\nfor name in ('torch', 'transformers', 'mc_transformers'): sys.modules[name] = None\n"
    blocked += f"sys.path.insert(0, {str(CHAT)!r})\n"
    found = subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments], capture_output=True, text=True, cwd="/", env={"PATH": ""}
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


GREEDY = """
import json
import onnx_model
folder, ids, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = onnx_model.OnnxModel(folder, 1)
memory, text, logits = model.empty(), [], []
for i in range(new):
    found = model.read(memory, ids)
    ids = [int(found.argmax())]
    text += ids
    logits.append(found.tolist())
    if i == new // 2:  # the rest from a file, by a model that has read nothing itself
        model.save(memory, folder + "/memory.npz")
        memory = model.load(folder + "/memory.npz")
reads = None if model.reads is None else model.reads.tolist()
print(json.dumps({"text": text, "logits": logits, "reads": reads}))
"""


def check(model, folder: Path) -> dict:
    """The greedy text of an exported model is that of `generate`, its logits within rounding; returns what it said."""
    ids = torch.randint(2, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, max_new_tokens=NEW, **options)
    found = json.loads(without_torch(GREEDY, str(folder), json.dumps(ids[0].tolist()), str(NEW)))
    assert found["text"] == expected.sequences[0, PROMPT:].tolist()
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.cat(expected.logits), rtol=0, atol=1e-3)
    return found | {"ids": expected.sequences}


def exported(tmp_path: Path, *options: str, **fields) -> tuple[mc.MCForCausalLM, Path]:
    model = build(small_config(**fields)).eval()
    model.save_pretrained(tmp_path / "model")
    argv = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--piece", str(PIECE), "--max-length", str(ROOM)]
    assert main([*argv, *options]) == 0
    return model, tmp_path / "out"


@with_onnx
def test_text_and_reads_over_many_borders(tmp_path) -> None:
    """A bounded cache that has forgotten most of the text, and a memory that went to a file."""
    fields = {"memory": "gated_linear", "aggregation": "grm", "max_cached_segments": 3}
    model, folder = exported(tmp_path, "--reads", **fields)
    found = check(model, folder)
    gates = model(found["ids"][:, :-1], output_attentions=True).attentions
    expected = torch.stack([layer[0, :, -1] for layer in gates])
    reads = torch.tensor(found["reads"])[..., [*range(expected.shape[-1] - 1), -1]]  # columns of later segments
    torch.testing.assert_close(reads, expected, rtol=0, atol=1e-4)
    assert (expected > 0).sum() == 2 * (3 + 1)  # heads x segments
    damage_and_strangers(folder)


def damage_and_strangers(folder: Path) -> None:
    """Memories of others, of another shape, and files that are none, are refused by name."""
    about = json.loads((folder / "export.json").read_text())
    code = """
import json
import onnx_model
model = onnx_model.OnnxModel(sys.argv[1], 1)
for field, value, name in json.loads(sys.argv[2]):
    model.about, about = model.about | {field: value}, model.about
    try:
        model.load(sys.argv[1] + "/" + name)
        print("loaded")
    except (ValueError, FileNotFoundError) as error:
        print(error)
    model.about = about
"""
    (folder / "cut.npz").write_bytes((folder / "memory.npz").read_bytes()[:-50])
    np.savez(folder / "evil.npz", about=np.array([{}], dtype=object))
    cases = [("format", 1, "memory.npz", "loaded"), ("fingerprint", "x" * 64, "memory.npz", "another model")]
    cases += [("weights", "int8", "memory.npz", "another model"), ("format", 1, "cut.npz", "is damaged")]
    cases += [("states", about["states"][:-1], "memory.npz", "another `max_length`")]
    cases += [("format", 1, "evil.npz", "is damaged"), ("format", 1, "none.npz", "No such file")]
    said = without_torch(code, str(folder), json.dumps([case[:3] for case in cases])).splitlines()
    assert len(said) == len(cases) and all(case[3] in line for case, line in zip(cases, said, strict=True)), said
    assert not list(folder.glob(".memory*"))


@with_onnx
def test_one_token_of_a_deep_memory() -> None:
    """The graph alone, from its own first states: the memory's start is learned."""
    import onnx_ir
    import onnxruntime

    from mc_transformers.conversion.export.run import trace

    model = build(small_config("titans", aggregation="ssc")).eval()
    states = graph.first_states(model, ROOM)
    step, inputs = graph.steps(model, states, ROOM, PIECE, False)["decode"]
    program = trace({"decode": (step, inputs)}, "onnx")["decode"]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(program).SerializeToString())
    names = [x.name for x in session.get_outputs()]
    feed = {x.name: inputs[x.name].numpy() for x in session.get_inputs()}
    found = dict(zip(names, session.run(None, feed), strict=True))
    with torch.no_grad():
        plain = step(**inputs)
        # outside of a graph a token that ends no segment leaves its slots as they are, and names no slot
        untouched = {name for name in plain if name not in found}
        assert found["slot"] == -1
        assert {name.replace("next_", "finished_") for name in untouched} | {"slot"} == set(found) - set(plain)
        for name in set(plain) - untouched:
            expected = plain[name]
            torch.testing.assert_close(torch.from_numpy(found[name]), expected, rtol=0, atol=1e-5)
        logits = model(inputs["input_ids"]).logits[:, -1]
    torch.testing.assert_close(torch.from_numpy(found["logits"]), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_triangle_is_solved(size: int) -> None:
    system = torch.randn(2, 3, size, size, dtype=torch.float64) * 0.3
    right = torch.randn(2, 3, size, 4, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(system.tril(-1), right, upper=False, unitriangular=True)
    torch.testing.assert_close(solve_unit_lower(system, right), expected)


def test_ops_are_inlined_in_a_region_only() -> None:
    calls = [torch.randn(1, 2, 8, 2, 4) for _ in range(3)]
    plain = linear_write(*calls)
    with torch.no_grad():
        for inlined, region in ((False, torch.no_grad()), (True, Inlined())):
            with region:
                program = torch.export.export(Write(), tuple(calls))
            assert ("linear_write" not in str(program.graph)) == inlined
            torch.testing.assert_close(program.module()(*calls), plain)


class Write(torch.nn.Module):
    def forward(self, q, k, v):
        return linear_write(q, k, v)


REFUSED = [
    ({"segmentation": "logarithmic"}, "`segmentation`='logarithmic' is not possible, allowed: 'constant'"),
    ({"max_cached_segments": 2, "cache_eviction": "least_read"}, "`cache_eviction`='least_read'"),
    ({"memory": "lstm"}, "`memory`='lstm' is not possible"),
    ({"num_hidden_layers": 2, "layer_types": ["full_attention", "memory_caching"]}, "`layer_types` with 'full_atten"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_what_no_graph_expresses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        limits.check_config(small_config(**{"aggregation": "grm"} | fields))
    assert message in str(error.value)


def test_requests(monkeypatch) -> None:
    limits.check_config(small_config(aggregation="grm", cache_eviction="least_read"))  # of an unbounded cache
    for request, message in (
        (("tflite", "float32", 8), "`to`='tflite'"),
        (("onnx", "int2", 8), "`weights`='int2'"),
        (("torch", "int8", 8), "'torch', allowed: 'float32'"),
        (("onnx", "float32", 1), "`piece`=1"),
    ):
        with pytest.raises(ValueError, match=message):
            limits.check_request(*request)
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"has no exporters: needs transformers>=5.24"):
        limits.check_packages("onnx")
    monkeypatch.setattr(limits, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"onnxscript is missing: pip install 'mc-transformers\[export\]'"):
        limits.check_packages("onnx")


# ---------------------------------------------------------------------------------------------------- make test-export
@every
@with_onnx
@pytest.mark.parametrize("fields", [*MATRIX, *OTHERS], ids=str)
def test_matrix(fields: dict, tmp_path) -> None:
    check(*exported(tmp_path, **fields))


@every
@with_onnx
@pytest.mark.parametrize("fields", MATRIX[:15:5], ids=str)
def test_torch_programs(fields: dict, tmp_path) -> None:
    """The same two graphs as `torch.export` keeps them, with none of our ops in them."""
    model, folder = exported(tmp_path, "--to", "torch", **fields)
    states = {state["name"]: state for state in json.loads((folder / "export.json").read_text())["states"]}
    start = (folder / "start.bin").read_bytes()
    inputs = {}
    for name, state in states.items():
        dtype, count = getattr(torch, state["dtype"]), int(np.prod(state["shape"]))
        given = "start" in state
        flat = torch.frombuffer(bytearray(start), dtype=dtype, count=count, offset=state["start"]) if given else None
        inputs[name] = torch.zeros(state["shape"], dtype=dtype) if flat is None else flat.reshape(state["shape"])
    ids = torch.randint(2, 61, (1, PIECE))
    program = torch.export.load(folder / "prefill.pt2")
    assert "mc_transformers" not in str(program.graph)
    out = program.module()(input_ids=ids, length=torch.tensor([PIECE]), **inputs)
    torch.testing.assert_close(out["logits"], model(ids).logits[:, -1], rtol=0, atol=1e-4)


@every
@with_onnx
def test_int8_weights_of_a_trained_model(tmp_path) -> None:
    """A fifth of a nat is far more than what rounding the weights of the shipped checkpoint costs."""
    assert main(["export", str(TRAINED), str(tmp_path / "out"), "--weights", "int8", "--max-length", "512"]) == 0
    text = (ROOT / "serving" / "page.py").read_text()[:400]
    model = mc.MCForCausalLM.from_pretrained(TRAINED)
    ids = AutoTokenizer.from_pretrained(TRAINED)(text)["input_ids"]
    code = "import json, onnx_model\nmodel = onnx_model.OnnxModel(sys.argv[1], 1)\nmemory = model.empty()\n"
    code += "print(json.dumps([model.read(memory, [i]).tolist() for i in json.loads(sys.argv[2])]))"
    logits = torch.tensor(json.loads(without_torch(code, str(tmp_path / "out"), json.dumps(ids[:-1]))))
    target = torch.tensor(ids[1:])
    found = torch.nn.functional.cross_entropy(logits, target)
    expected = torch.nn.functional.cross_entropy(model(torch.tensor([ids[:-1]])).logits[0], target)
    assert abs(found - expected) < 0.2
    assert (tmp_path / "out" / "weights.data").stat().st_size < 0.5 * (TRAINED / "model.safetensors").stat().st_size
