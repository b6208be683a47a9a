"""What a new gate function costs: its value, its pull-back and an entry in the table. Everything else is there."""

import pytest
import torch
from test_equations import check

from helpers import assert_close, build, small_config, tokens
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.kernels.read.gates import GATE_FUNCTIONS, GateFunction


SOFTPLUS = GateFunction(
    value=torch.nn.functional.softplus,  # each gate on its own, positive, and without an upper end
    pull_back=lambda logits, gates, grad: grad * logits.sigmoid(),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(GATE_FUNCTIONS, "softplus", SOFTPLUS)


CASES = [
    {"memory": "gated_linear", "aggregation": "grm"},
    {"memory": "gated_linear", "aggregation": "ssc", "summaries_per_segment": 2},
    {"memory": "linear", "aggregation": "soup", "segmentation": "logarithmic"},
    {"memory": "dla", "aggregation": "soup"},
    {"memory": "titans", "aggregation": "grm", "segmentation": "logarithmic", "summaries_per_segment": 2},
    {"memory": "titans", "aggregation": "ssc", "state_init": "checkpoint"},
    {"memory": "lstm", "aggregation": "grm"},
]


@pytest.mark.parametrize("function", ["softplus", "relu"])
@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_it_is_token_by_token_with_every_read_rule(fields, function):
    """Values and gradients; the second function is one that the package brings and that shuts gates altogether."""
    model = build(small_config(**fields, gate_function=function), dtype=torch.float64)
    check(model, tokens(2, 27))
    mask = torch.ones(2, 27, dtype=torch.long)
    mask[0, :5] = mask[1, 9:12] = 0
    check(model, tokens(2, 27), mask)


@pytest.mark.parametrize("function", ["softplus", "relu"])
@pytest.mark.parametrize("aggregation", ["grm", "ssc", "soup"])
def test_it_generates_and_is_saved(aggregation, function, tmp_path):
    fields = {"aggregation": aggregation, "gate_function": function}
    model, ids = build(small_config("gated_linear", **fields)), tokens(1, 19)
    model.save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.gate_function == function
    assert_close(loaded(ids).logits, model(ids).logits, 1e-6)
    cached = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))


def test_it_is_compiled_into_one_graph():
    for function in ("softplus", "relu"):
        for aggregation in ("grm", "ssc"):
            config = small_config("gated_linear", aggregation=aggregation, gate_function=function)
            model, ids = build(config, dtype=torch.float64), tokens(1, 19)
            compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
            actual = compiled(ids, use_cache=False).last_hidden_state
            assert_close(actual.detach(), model.model(ids, use_cache=False).last_hidden_state.detach(), 1e-10)
            actual.sum().backward()


def test_a_gate_matters():
    """The comparisons above would pass if every name ran as the softmax."""
    ids = tokens(1, 27)
    logits = [
        build(small_config("gated_linear", gate_function=name))(ids).logits
        for name in ("softmax", "sigmoid", "relu", "softplus")
    ]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[:i])


def test_only_what_is_registered_is_known():
    with pytest.raises(ValueError, match="`gate_function`='softmux'.*'softplus'"):
        MCConfig(gate_function="softmux")
    with pytest.raises(ValueError, match="`gate_function`='softplus'.*with mc_backend='triton'"):
        MCConfig(gate_function="softplus", mc_backend="triton")
