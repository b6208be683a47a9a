"""DLA and Titans: the closed form against gradients by autograd token by token, the reads, and that memories learn."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from helpers import assert_close, build, small_config, tokens
from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.kernels.read import deep as reads
from mc_transformers.kernels.read import segment as segment_read
from mc_transformers.kernels.write import deep as writes
from mc_transformers.modeling_mc.compat import CACHE_NAME
from mc_transformers.modeling_mc.memories import MEMORIES, deep
from mc_transformers.modeling_mc.segments import SegmentTable


HEADS, WIDTH, HIDDEN, LENGTH = 2, 6, 12, 17
RULES = {"dla": {}, "dla-decay": {"memory_decay": True}, "titans": {}}


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def memory_of(rule: str, **fields):
    """A memory in float64 with an M_0 and a norm of everyday size."""
    sizes = {"head_dim": WIDTH, "memory_expansion": HIDDEN // WIDTH, "value_head_dim": WIDTH}
    name = rule.split("-")[0]
    memory = MEMORIES[name](small_config(name, **sizes | RULES.get(rule, {}) | fields)).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(randn(*parameter.shape, scale=0.4) + (parameter.shape[-2:] == (HEADS, WIDTH)))
    return memory


def inputs_of(memory, rows: int = 1, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """q, k, v and the gates' pre-activations `[rows, 1, length, H, ...]`, as leaves."""
    shape = (rows, 1, length, HEADS)
    q, k, v = (randn(*shape, WIDTH) for _ in range(3))
    raw = {f"raw.{name}": randn(*shape) + 2 * (name == "a") for name in memory.gate_names}
    given = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v} | raw
    return {name: x.requires_grad_() for name, x in given.items()}


def gates_of(memory, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return memory.gates({name[4:]: x for name, x in given.items() if name.startswith("raw.")}, given["k"], None)


def random_state(memory, rows: int = 1) -> list[torch.Tensor]:
    """W, C = W and S != 0 at the start of an inner chunk."""
    w = [randn(rows, HEADS, *shape, scale=0.4).requires_grad_() for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    s = [randn(*part.shape, scale=0.05).requires_grad_() for part in w] if memory.momentum else []
    return [*w, *w, *s, torch.zeros(rows, HEADS, dtype=torch.float64)]


def write(memory, given, state, segment_size: int, carry: bool = False, begin: int = 0):
    """`Memory.write` of all tokens as if `begin` had been written before."""
    rows, _, length = given["q"].shape[:3]
    position = None if state is None else torch.full((rows,), begin)
    table = SegmentTable.build(rows, length, segment_size, torch.device("cpu"), position=position, align=memory.chunk)

    def grid(x):
        return table.to_grid(x[:, 0])

    q, k, v = grid(given["q"]), table.clear(grid(given["k"])), table.clear(grid(given["v"]))
    gates = {name: table.clear(grid(gate)) for name, gate in gates_of(memory, given).items()}
    return table, memory.write(q, k, v, gates, table, None if state is None else tuple(state), carry)


# ------------------------------------------------------------------------------------ the recurrence, by autograd
def answer(memory, maps, x: torch.Tensor, head: int) -> torch.Tensor:
    r = F.gelu(x @ maps[0]) @ maps[1]
    if memory.head_norm is not None:
        weight, bias = memory.head_norm.weight[head], memory.head_norm.bias[head]
        r = F.layer_norm(r, r.shape[-1:], eps=1e-6) * weight + bias
    return x + r


def inner_loss(memory, maps, k, v, head: int) -> torch.Tensor:
    out = answer(memory, maps, k, head)
    return -(out * v).sum() if memory.loss == "dot" else (out - v).square().sum()


def one_by_one(memory, given, state):
    """Online answers `[1, 1, T, H, d]`, last W and S: every gradient by autograd, at the maps of the chunk start."""
    alpha, beta = (torch.sigmoid(given[f"raw.{n}"]) if f"raw.{n}" in given else None for n in "ab")
    eta = 0.1 * torch.sigmoid(given["raw.e"])
    answers, ends = [], []
    for h in range(HEADS):
        maps = [part[0, h] for part in state[:2]]
        momentum = [part[0, h] for part in state[4:6]] if memory.momentum else [torch.zeros_like(x) for x in maps]
        for t in range(given["q"].shape[2]):
            at = (0, 0, t, h)
            if t % memory.chunk == 0:
                start = maps
            loss = inner_loss(memory, start, given["k"][at], given["v"][at], h)
            grads = torch.autograd.grad(loss, start, create_graph=True)
            kept = 0.0 if not memory.momentum else beta[at]
            momentum = [kept * s - eta[at] * g for s, g in zip(momentum, grads, strict=True)]
            maps = [(1.0 if alpha is None else alpha[at]) * w + s for w, s in zip(maps, momentum, strict=True)]
            answers.append(answer(memory, maps, given["q"][at], h))
        ends.append([*maps, *(momentum if memory.momentum else [])])
    online = torch.stack(answers).view(HEADS, -1, WIDTH).transpose(0, 1)[None, None]
    return online, [torch.stack(parts)[None] for parts in zip(*ends, strict=True)]


@pytest.mark.parametrize("chunk", [1, 4, 5, LENGTH])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("loss", ["dot", "l2"])
@pytest.mark.parametrize("rule", RULES)
def test_closed_form(rule, loss, norm, chunk):
    """Values, end states and all outer gradients, from a state with momentum."""
    memory = memory_of(rule, memory_chunk_size=chunk, segment_size=20 * chunk, memory_head_norm=norm)
    memory.loss = loss
    given, state = inputs_of(memory), random_state(memory)
    expected, last = one_by_one(memory, given, state)
    table, trace = write(memory, given, state, 20 * chunk)
    online = table.from_grid(trace.online)[:, None]
    ends = [trace.ends[i][:, 0] for i in (0, 1, *((4, 5) if memory.momentum else ()))]
    weights = [randn(*x.shape) for x in (expected, *last)]
    leaves = [*given.values(), *state[:2], *state[4:-1], *(memory.norm if norm else ())]

    def gradients(outputs):
        return torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), leaves)

    for actual, wanted in zip((online, *ends), (expected, *last), strict=True):
        assert_close(actual, wanted, 1e-10, "value")
    for actual, wanted in zip(gradients((online, *ends)), gradients((expected, *last)), strict=True):
        assert_close(actual, wanted, 1e-9, "gradient")


@pytest.mark.parametrize("rule", RULES)
def test_literal_signs_climb(rule):
    """Eq. 34-35 as printed subtract a momentum that holds minus the gradient; ours descends."""
    memory = memory_of(rule, memory_chunk_size=1)
    given, state = inputs_of(memory, length=1), random_state(memory)
    state[4:-1] = [torch.zeros_like(s) for s in state[4:-1]]
    k, v = given["k"][:, 0, 0], given["v"][:, 0, 0]
    gates = {name: gate[:, 0, 0] for name, gate in gates_of(memory, given).items()}
    gates["step"] = gates["step"] / 100
    if "log_decay" in gates:
        gates["log_decay"] = torch.zeros_like(gates["log_decay"])
    after = memory.step(tuple(state), k, v, gates)
    literal = [2 * w - new for w, new in zip(state[:2], after[:2], strict=True)]  # W - S instead of W + S
    for h in range(HEADS):
        before, ours, climbed = (
            inner_loss(memory, [part[0, h] for part in maps[:2]], k[0, h], v[0, h], h)
            for maps in (state, after, literal)
        )
        assert ours < before < climbed


# ---------------------------------------------------------------------------------------------- pieces and blocks
@pytest.mark.parametrize("begin", [1, 4, 5, 8, 11])
@pytest.mark.parametrize("carry", [False, True], ids=["independent", "checkpoint"])
@pytest.mark.parametrize("piece", [1, deep.PIECE])
@pytest.mark.parametrize("rule", ["dla", "titans"])
def test_a_prompt_in_two_parts(monkeypatch, rule, piece, carry, begin):
    """Values, and gradients of M_0 through the state in the middle of an inner chunk."""
    monkeypatch.setattr(deep, "PIECE", piece)
    memory = memory_of(rule, segment_size=8, memory_chunk_size=4)
    given = inputs_of(memory, rows=2)
    weights = randn(*given["v"][:, 0].shape)
    table, trace = write(memory, given, None, 8, carry)
    whole = table.from_grid(trace.online)

    first, second = ({n: x[:, :, part] for n, x in given.items()} for part in (slice(begin), slice(begin, None)))
    table, trace = write(memory, first, None, 8, carry)
    parts, last = [table.from_grid(trace.online)], table.running_index()[0]
    if last < table.num_segments:
        state = [end[:, last] for end in trace.ends]
    else:
        state = [end[:, -1] for end in trace.ends] if carry else memory.initial_state(2, whole.device, whole.dtype)
    table, trace = write(memory, second, state, 8, carry, begin)
    parts.append(table.from_grid(trace.online))

    leaves = [*given.values(), *memory.parameters()]
    assert_close(torch.cat(parts, 1), whole, 1e-10)
    for actual, expected in zip(
        torch.autograd.grad((torch.cat(parts, 1) * weights).sum(), leaves),
        torch.autograd.grad((whole * weights).sum(), leaves),
        strict=True,
    ):
        assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc", "residual"])
def test_work_may_be_cut_anywhere(monkeypatch, aggregation):
    """Pieces of a segment, blocks of rows, of memories and of tiles: the results are the same in any size."""
    fields = {"memory": "titans", "segment_size": 16, "aggregation": aggregation, "head_dim": WIDTH}
    ids = tokens(2, 43)

    def run():
        model = build(MCConfig(**small_config(**fields).to_diff_dict()), dtype=torch.float64)
        logits = model(ids, use_cache=False).logits
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters())]

    expected = run()
    monkeypatch.setattr(deep, "PIECE", 2)
    for module, name in ((writes, "BUDGET"), (segment_read, "BUDGET"), (reads, "TILE_BUDGET")):
        monkeypatch.setattr(module, name, 1)
    for actual, wanted in zip(run(), expected, strict=True):
        assert_close(actual, wanted, 1e-10)


# ------------------------------------------------------------------------------------------------------- learning
def learning_model(memory: str, **fields) -> MCForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 1}
    return MCForCausalLM(MCConfig(num_attention_heads=2, segment_size=64, memory=memory, **sizes, **fields))


def check_learns(model: MCForCausalLM) -> None:
    """After 64 written tokens, 16 pairs four times: a lower inner loss and answers nearer to the values than before;
    and the outer loss reaches the projections and M_0."""
    memory = model.model.layers[0].mixer.memory
    k, v = (
        F.normalize(torch.randn(1, 16, 2, 64), dim=-1).repeat(1, 4, 1, 1),
        torch.randn(1, 16, 2, 64).repeat(1, 4, 1, 1),
    )
    gates = memory.gates(
        {name: torch.full((1, 64, 2), memory.gate_bias.get(name, 0.0)) for name in memory.gate_names}, k, None
    )
    state = memory.initial_state(1, k.device)

    def quality(state):
        out = memory.read(tuple(part[:, None] for part in state[:2]), k[:, :16])
        loss = -(out * v[:, :16]).sum(-1) if memory.loss == "dot" else (out - v[:, :16]).square().sum(-1)
        return loss.mean().item(), F.cosine_similarity(out, v[:, :16], dim=-1).mean().item()

    with torch.no_grad():
        loss, similarity = quality(state)
        for t in range(64):
            state = memory.step(state, k[:, t], v[:, t], {name: gate[:, t] for name, gate in gates.items()})
        later_loss, later_similarity = quality(state)
    assert later_loss < loss - 1 and later_similarity > similarity + 0.3

    ids = tokens(1, 100)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "initial_state")):
            assert parameter.grad.abs().max() > 0, name


LEARNERS = [(name, norm) for name, norm in itertools.product(("dla", "titans"), (True, False))]


@pytest.mark.parametrize(("name", "norm"), LEARNERS)
def test_a_memory_learns(name, norm):
    check_learns(learning_model(name, memory_head_norm=norm))


@pytest.mark.parametrize(("name", "norm"), LEARNERS)
def test_a_memory_that_starts_at_zero_never_learns(name, norm):
    model = learning_model(name, memory_head_norm=norm)
    with torch.no_grad():
        for parameter in model.model.layers[0].mixer.memory.parameters():
            if parameter.dim() == 3:
                parameter.zero_()
    with pytest.raises(AssertionError):
        check_learns(model)


def test_soup_of_deep_memories_is_not_grm():
    logits = {}
    for aggregation in ("grm", "soup"):
        logits[aggregation] = build(small_config("dla", aggregation=aggregation))(tokens(2, 29)).logits
    assert_close(logits["grm"][:, :8], logits["soup"][:, :8], 1e-5)  # nothing is cached yet
    assert (logits["grm"][:, 8:] - logits["soup"][:, 8:]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc", "residual"])
@pytest.mark.parametrize("rule", ["dla", "titans"])
def test_what_autograd_keeps_is_linear_in_the_length(rule, aggregation):
    """No hidden activation per token, let alone per token and cached memory, waits for the backward."""
    config = small_config(rule, aggregation=aggregation, segment_size=16, memory_chunk_size=8, memory_expansion=64)
    model, hidden, heads = build(config), 64 * config.head_dim, config.num_attention_heads

    def kept(length: int) -> tuple[int, int]:
        """Elements of all tensors that autograd keeps, and of the largest, without segments' end states."""
        sizes = {}

        def pack(x):
            if x.shape[-2:] not in ((config.head_dim, hidden), (hidden, config.head_dim)):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(tokens(1, length), use_cache=False).logits.sum()
        loss.backward()
        return sum(sizes.values()), max(sizes.values())

    (short, _), (long, largest) = kept(256), kept(512)
    assert long < 2.2 * short
    # soup hands the hidden layer of its one mixed memory from map to map; nobody else has one per token
    assert largest <= 512 * heads * hidden * (aggregation == "soup") + 512 * 64


@pytest.mark.parametrize("rule", ["dla", "titans"])
def test_half_precision(rule):
    """Inside autocast the inner steps are still taken in fp32, by the parallel form and token by token."""
    model, ids, states = build(small_config(rule)), tokens(2, 29), []
    for backend in ("torch", "reference"):
        model.config.mc_backend = backend
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids, use_cache=True)[CACHE_NAME]
        states.append([*cache.layers[0].storage.group("state")[:2], *cache.layers[0].storage.group("kept")])
    for parallel, one_by_one in zip(*states, strict=True):
        assert parallel.dtype == one_by_one.dtype == torch.float32
        assert_close(parallel, one_by_one, 1e-4)
