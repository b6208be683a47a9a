"""LSTM and GRU as memories: against torch's own cells token by token, both reads against their equations."""

import itertools

import pytest
import torch
from test_equations import check as check_against_reference
from torch import nn

from helpers import accepts, assert_close, build, family, name_of, randn, small_config, tokens
from mc_transformers import MCCache, MCConfig, MCForCausalLM
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.modeling_mc.aggregation import Aggregation
from mc_transformers.modeling_mc.compat import CACHE_NAME
from mc_transformers.modeling_mc.history import Caches
from mc_transformers.modeling_mc.memories import MEMORIES, Trace
from mc_transformers.modeling_mc.memories.vector import Cell
from mc_transformers.modeling_mc.segments import SegmentTable


HEADS, WIDTH, SEGMENT = 2, 8, 8
FUSED = {"lstm": (nn.LSTM, nn.LSTMCell, 4), "gru": (nn.GRU, nn.GRUCell, 3)}


def memory_of(name: str, **fields):
    """A memory in float64 with weights that matter."""
    memory = MEMORIES[name](small_config(name, **fields)).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return memory


# ------------------------------------------------------------------------------------------------------- the write
TABLES = {
    "whole-segments": {"num_tokens": 24},
    "short-last-segment": {"num_tokens": 21},
    "one-token": {"num_tokens": 1},
    "padding": {"num_tokens": 24, "attention_mask": torch.tensor([[0] * 5 + [1] * 19, [1] * 3 + [0] * 21])},
    "resumed": {"num_tokens": 13, "position": torch.tensor([11, 3])},
    "resumed-with-padding": {
        "num_tokens": 6,
        "position": torch.tensor([8, 6]),
        "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2]),
    },
    "nothing-in-a-row": {"num_tokens": 4, "attention_mask": torch.tensor([[0] * 4, [1] * 4])},
    "packed": {"num_tokens": 30, "cu_seq_lens": torch.tensor([0, 3, 11, 12, 30]), "batch_size": 1},
}


def table_of(case: str) -> SegmentTable:
    fields = {"batch_size": 2, "segment_size": SEGMENT, "device": torch.device("cpu")} | TABLES[case]
    return SegmentTable.build(**fields)


def cell_by_cell(memory, name, q, k, v, table, state, carry):
    """Torch's one-token cell over one sequence after the other; q * h, and the state after every grid segment."""
    inputs, width = HEADS * 2 * WIDTH, HEADS * WIDTH
    cell = FUSED[name][1](inputs, width).double()
    weights = {name.removesuffix("_l0"): p for name, p in memory.cell.named_parameters()}
    rows, num, slots = table.valid.shape
    online, ends = torch.zeros_like(v), []
    for r in range(rows):
        now = [part[r : r + 1].flatten(1) for part in state]
        for n in range(num):
            if (n > 0 and not carry) or (carry and table.starts is not None and table.starts[r, n]):
                now = [torch.zeros_like(part) for part in now]
            for w in range(slots):
                if not table.valid[r, n, w]:
                    continue
                x = torch.cat([k[r, n, w].flatten(), v[r, n, w].flatten()])[None]
                after = torch.func.functional_call(cell, weights, (x, tuple(now) if name == "lstm" else now[0]))
                now = list(after) if name == "lstm" else [after]
                online[r, n, w] = q[r, n, w] * now[0].view(HEADS, WIDTH)
            ends.append(torch.stack([part.view(HEADS, WIDTH) for part in now]))
    return online, torch.stack(ends).view(rows, num, len(state), HEADS, WIDTH).transpose(1, 2).transpose(0, 1)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("name", FUSED)
def test_write_against_torch_cells(name, case, carry):
    """Values and gradients, and the exact state where a segment ends before its last slot."""
    table, memory = table_of(case), memory_of(name)
    rows, num, slots = table.valid.shape
    q, k, v = (table.clear(randn(rows, num, slots, HEADS, WIDTH)).requires_grad_() for _ in range(3))
    state = tuple(randn(rows, HEADS, WIDTH).requires_grad_() for _ in range(memory.num_states))
    trained = [q, k, v, *state, *memory.cell.parameters()]
    results = []
    for expected in (False, True):
        if expected:
            online, ends = cell_by_cell(memory, name, q, k, v, table, state, carry)
        else:
            trace = memory.write(q, k, v, {}, table, state, carry)
            online, ends = table.clear(trace.online), torch.stack(trace.ends)
        torch.manual_seed(4)
        total = (online * randn(*online.shape)).sum() + (ends * randn(*ends.shape)).sum()
        results.append((online, ends, *torch.autograd.grad(total, trained, materialize_grads=True)))
    for number, (actual, wanted) in enumerate(zip(*results, strict=True)):
        assert_close(actual, wanted, 1e-10 if number < 2 else 1e-9, f"output or gradient {number}")


@pytest.mark.parametrize("name", FUSED)
def test_weights_of_torch_modules_load(name):
    fused, _, gates = FUSED[name]
    module, cell = fused(6, 10, batch_first=True), Cell(6, 10, gates)
    cell.load_state_dict(module.state_dict())
    x = torch.randn(3, 5, 6)
    state = tuple(torch.randn(3, 10) for _ in range(gates - 2))
    expected, _ = module(x, tuple(s[None] for s in state) if name == "lstm" else state[0][None])
    assert_close(cell(x, state[: 2 if name == "lstm" else 1], None)[0], expected, 1e-6)


def test_initial_weights():
    """Torch's range, and a forget gate that starts open."""
    cell = MCForCausalLM(small_config("lstm")).model.layers[0].mixer.memory.cell
    bound = (HEADS * WIDTH) ** -0.5
    assert 0.9 * bound < cell.weight_ih_l0.abs().max() <= bound
    assert cell.bias_ih_l0.view(4, -1).mean(1).tolist() == [0, 1, 0, 0] and not cell.bias_hh_l0.any()


# ------------------------------------------------------------------------------------- the fused RNNs as an op


def with_gradients(inputs: list) -> list:
    return [x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_cells_get_contiguous_states(name, monkeypatch):
    """cuDNN, which runs them on a GPU, refuses others: a level of logarithmic segmentation is cut out of a cache."""
    fused, seen = getattr(torch, name), []

    def spy(x, state, *rest):
        seen.extend(state if isinstance(state, tuple) else [state])
        return fused(x, state, *rest)

    monkeypatch.setattr(torch, name, spy)
    model = build(small_config(name, aggregation="grm", state_init="checkpoint", segmentation="logarithmic"))
    cache = MCCache(config=model.config)
    for part in tokens(2, 4 * SEGMENT).split(2 * SEGMENT, 1):
        model(part, cache=cache)
    assert seen and all(state.is_contiguous() for state in seen)


@pytest.mark.parametrize("kind", ["lstm-multiply-grm", "gru-add-grm", "gru-add-ssc"])
def test_compiled_in_one_piece(kind):
    fields = dict(zip(("memory", "vector_read", "aggregation"), kind.split("-"), strict=True))
    model, ids = build(small_config(**fields)), tokens(2, 2 * SEGMENT + 3)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits = function(ids, use_cache=False).logits
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()), allow_unused=True)))
    for actual, expected in zip(*results, strict=True):
        if expected is not None:
            assert_close(actual, expected, 1e-4)


# -------------------------------------------------------------------------------------------------------- the reads
def read_equations(memory, config, q, u, online, logit, caches):
    """y_t of every read, one token, head and memory after the other."""
    (h,), add = caches.states, config.vector_read != "multiply"
    out = torch.zeros_like(online)
    for r, n, w, head in itertools.product(*(range(size) for size in online.shape[:-1])):
        at = (r, n, w, head)
        seen = [i for i in range(h.shape[1]) if caches.birth[r, i] <= n and i >= caches.first[r, n]]
        score = {i: (u[at] @ caches.summaries[r, i, head, 0]).item() for i in seen}
        if config.aggregation == "ssc":
            seen = sorted(score, key=score.get, reverse=True)[: config.num_selected_segments]
        memories, now = [h[r, i, head] for i in seen], online[at] if add else online[at] / q[at]
        if add and config.aggregation in ("grm", "soup", "ssc"):
            half = memory.read_gate.weight[head].chunk(2, -1)
            gates = [(half[0] @ now + half[1] @ x + memory.read_gate.bias[head]).sigmoid() for x in memories]
            own = 1.0
            if config.vector_read == "add_weighted":
                logits = torch.stack([*(torch.tensor(score[i], dtype=u.dtype) for i in seen), logit[at]])
                *weights, own = logits.softmax(0)
                gates = [w * g for w, g in zip(weights, gates, strict=True)]
        elif config.aggregation in ("residual", "mean"):
            share = 1 / (len(seen) + 1) if config.aggregation == "mean" else 1.0
            gates, own = [share] * len(seen), share
        else:
            logits = torch.stack([*(torch.tensor(score[i], dtype=u.dtype) for i in seen), logit[at]])
            *gates, own = logits.softmax(0)
        total = own * now + sum((g * x for g, x in zip(gates, memories, strict=True)), torch.zeros_like(now))
        out[at] = total if add else q[at] * total
    return out


@pytest.mark.parametrize("read", CHOICES["vector_read"])
@pytest.mark.parametrize("aggregation", [name for name in CHOICES["aggregation"] if name != "none"])
def test_reads_against_their_equations(aggregation, read):
    if not accepts(memory="gru", vector_read=read, aggregation=aggregation):
        pytest.skip("the config refuses it")
    rows, num, slots, cached = 2, 3, 4, 2
    memory = memory_of("gru", vector_read=read, aggregation=aggregation)
    config = small_config("gru", vector_read=read, aggregation=aggregation)
    q, u, h_t = (randn(rows, num, slots, HEADS, WIDTH) for _ in range(3))
    online, logit = memory._answer(h_t, q), randn(rows, num, slots, HEADS)
    birth = torch.tensor([[0, 0, 1, 2, 3], [0, 2**30, 1, 2, 3]])
    first = torch.tensor([[0, 0, 0], [0, 0, 3]])
    states, summaries = randn(rows, cached + num, HEADS, WIDTH), randn(rows, cached + num, HEADS, 1, WIDTH)
    caches = Caches((states,), summaries, birth, first)
    with torch.no_grad():
        actual = Aggregation(config, memory).mix(q, u, Trace(online, ()), logit, caches, {})
        expected = read_equations(memory, config, q, u, online, logit, caches)
    assert_close(actual, expected, 1e-10)


ADD = [
    *family(memory=["lstm"], vector_read=["add"]),
    *family(memory=["gru"], vector_read=["add"], aggregation=["grm", "ssc"]),
    {"memory": "gru", "vector_read": "add", "aggregation": "ssc", "gate_source": "query"},
    {"memory": "lstm", "vector_read": "add_weighted", "aggregation": "ssc"},
]


@pytest.mark.parametrize("length", [SEGMENT, SEGMENT + 1, 3 * SEGMENT + 5])
@pytest.mark.parametrize("fields", ADD, ids=name_of)
def test_addition_is_token_by_token(fields, length):
    check_against_reference(build(small_config(**fields), dtype=torch.float64), tokens(2, length))


@pytest.mark.parametrize("fields", [x for x in ADD if x["aggregation"] in ("grm", "ssc")], ids=name_of)
def test_addition_with_padding_packing_and_pieces(fields):
    model = build(small_config(**fields), dtype=torch.float64)
    mask = torch.ones(3, 3 * SEGMENT + 1, dtype=torch.long)
    mask[0, :5], mask[1, -9:], mask[2, 3:17:2] = 0, 0, 0
    check_against_reference(model, tokens(*mask.shape), mask)
    check_against_reference(model, tokens(1, 30), cu_seq_lens_q=torch.tensor([0, 3, 11, 12, 30]))
    ids = tokens(2, 3 * SEGMENT + 5)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for pieces in ([1] * ids.shape[1], [5, 1, 16, 7], [SEGMENT, SEGMENT, 13]):
            cache = MCCache(config=model.config)
            out = [model(part, cache=cache).logits for part in ids.split(pieces, 1)]
            assert_close(torch.cat(out, 1), expected, 1e-10)


@pytest.mark.parametrize("source", ["projection", "query"])
@pytest.mark.parametrize("aggregation", ["none", "residual", "grm", "ssc"])
def test_addition_trains_everything_but_the_choice(aggregation, source):
    """The read has no query, so there is none unless it scores segments; choosing the k best passes no gradient."""
    fields = {"vector_read": "add", "aggregation": aggregation, "gate_source": source}
    model = build(small_config("lstm", **fields), dtype=torch.float64)
    logits = model(tokens(2, 3 * SEGMENT + 5), use_cache=False).logits
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(logits.sin().sum(), names.values(), allow_unused=True)
    without = {name for name, grad in zip(names, gradients, strict=True) if grad is None or grad.abs().max() < 1e-9}
    scores = ["u_proj"] if source == "projection" else ["q_proj", "q_conv"]
    assert without == {f"model.layers.0.mixer.{name}.weight" for name in scores if aggregation == "ssc"}


def test_a_weighed_choice_trains_everything():
    model = build(small_config("lstm", vector_read="add_weighted", aggregation="ssc"), dtype=torch.float64)
    logits = model(tokens(2, 3 * SEGMENT + 5), use_cache=False).logits
    gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()))
    assert all(grad.abs().max() > 1e-9 for grad in gradients)


def test_the_other_read_refuses_the_cache():
    """Its cache may hold no summaries."""
    cache = build(small_config("lstm", vector_read="add"))(tokens(1, 9), use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="vector_read='add', here 'multiply'"):
        build(small_config("lstm"))(tokens(1, 9), cache=cache)


# --------------------------------------------------------------------------------------------- the gated sum's op


# -------------------------------------------------------------------------------------------------------- the config
def test_refused_configs():
    with pytest.raises(ValueError, match="value_head_dim.*6.*head_dim=8"):
        small_config("lstm", value_head_dim=6)
    with pytest.raises(ValueError, match="vector_read.*'add'.*'multiply'.*'linear'"):
        MCConfig(memory="linear", vector_read="add")
    with pytest.raises(ValueError, match="vector_read.*'add_weighted'.*'multiply' or 'add'.*'ssc'"):
        MCConfig(memory="lstm", vector_read="add_weighted", aggregation="grm")
    with pytest.raises(ValueError, match="vector_read.*'concat'.*'multiply', 'add'"):
        MCConfig(memory="lstm", vector_read="concat")
