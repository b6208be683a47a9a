"""What the read and write rules must equal: the paper's equations written as plain loops, and its limit cases."""

import pytest
import torch

from helpers import (
    MEMORY_NAMES,
    ONE_MAP_MEMORIES,
    SEGMENTATIONS,
    assert_close,
    build,
    combinations,
    name_of,
    small_config,
    tokens,
)
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.modeling_mc.compat import CACHE_NAME


SIZE = 8
AGGREGATIONS = [x for x in CHOICES["aggregation"] if x != "none"]


class Answers:
    """What the memories of a one-layer float64 model answer `[B, T, H, dv]`, before the output norm, from:
    q, k, v, u `[B, T, H, d]` and gates."""

    def __init__(self, ids: torch.Tensor, like: "Answers | None" = None, **fields) -> None:
        self.model = build(small_config(**fields), dtype=torch.float64)
        if like is not None:  # the same weights; a model without content gates has no u_proj
            self.model.load_state_dict(like.model.state_dict(), strict=False)
        mixer = self.model.model.layers[0].mixer
        project = mixer._project

        def remember(*args):
            self.given = project(*args)
            return self.given

        mixer._project = remember
        handle = mixer.o_norm.register_forward_pre_hook(lambda module, args: setattr(self, "values", args[0]))
        with torch.no_grad():
            self.cache = self.model(ids, use_cache=True)[CACHE_NAME]
        handle.remove()


def naive(given, size: int, aggregation: str, carry: bool = False, top_k: int = 2, groups=None) -> torch.Tensor:
    """Linear memory with a read rule, token by token (eq. 7, 9, 10, 12, 16, 17).

    `groups(s)` lists the ranges of finished segments that are one memory each for a token with s finished segments.
    """
    q, k, v, u = given.q, given.k, given.v, given.u
    rows, length, heads, _ = q.shape
    groups = groups or (lambda s: [range(i, i + 1) for i in range(s)])
    out = torch.zeros_like(v)
    for r, t, h in torch.cartesian_prod(*(torch.arange(x) for x in (rows, length, heads))).tolist():

        def memory(start, stop, r=r, h=h):
            return torch.einsum("tk,tv->vk", k[r, start:stop, h], v[r, start:stop, h])

        s = t // size
        start, stops = s * size, [(g.start * size, g.stop * size) for g in groups(s)]
        online = memory(0 if carry else start, t + 1)
        past = [memory(0 if carry else a, b) for a, b in stops]
        gates = torch.ones(len(past) + 1, dtype=q.dtype)
        if aggregation == "mean":
            gates /= len(gates)
        elif aggregation in ("grm", "soup", "ssc"):
            means = [k[r, a:b, h].mean(0) for a, b in stops] + [k[r, start : t + 1, h].mean(0)]
            scores = torch.stack([u[r, t, h] @ mean for mean in means])
            if aggregation == "ssc" and len(past) > top_k:
                dropped = scores[:-1].argsort(descending=True)[top_k:]
                scores[dropped] = -torch.inf
            gates = scores.softmax(0)
        mixed = sum(g * m for g, m in zip(gates, [*past, online], strict=True))
        out[r, t, h] = mixed @ q[r, t, h]
    return out


@pytest.mark.parametrize("state_init", CHOICES["state_init"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_read_rules(aggregation, state_init):
    """eq. 7, 9, 15 and 17 letter by letter."""
    fields = {"aggregation": aggregation, "state_init": state_init}
    got = Answers(tokens(2, 4 * SIZE + 3), memory="linear", **fields)
    assert_close(got.values, naive(got.given, SIZE, aggregation, state_init == "checkpoint"), 1e-10)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_logarithmic_segments(aggregation):
    """A token with s finished segments reads one memory per bit set in s: 37 = 32 + 4 + 1."""

    def binary(s: int) -> list[range]:
        ranges, start = [], 0
        for bit in reversed(range(s.bit_length())):
            if s >> bit & 1:
                ranges.append(range(start, start + (1 << bit)))
                start += 1 << bit
        return ranges

    assert [len(r) for r in binary(37)] == [32, 4, 1]
    fields = {"aggregation": aggregation, "segmentation": "logarithmic", "segment_size": 2, "memory_chunk_size": 2}
    got = Answers(tokens(1, 2 * 37 + 1), memory="linear", **fields)
    assert_close(got.values, naive(got.given, 2, aggregation, groups=binary), 1e-10)


@pytest.mark.parametrize("memory", ["linear", "retention", "gated_linear", "swla"])
def test_write_rules(memory):
    """eq. 12 and 28, and linear attention with decay: the recurrences, token by token."""
    got = Answers(tokens(2, 2 * SIZE + 3), memory=memory, aggregation="none")
    q, k, v, gates = got.given.q, got.given.k, got.given.v, got.given.gates
    state = torch.zeros(2, 2, v.shape[-1], k.shape[-1], dtype=q.dtype)
    for t in range(q.shape[1]):
        new = torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        if memory == "linear":
            state = state + new
        elif memory == "retention":
            gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=q.dtype))
            state = gamma[:, None, None] * state + new
        elif memory == "gated_linear":
            state = gates["log_decay"].exp()[:, t, :, None, None] * state + new
        else:
            again, alpha = gates["again"][:, t, :, None, None], gates["log_decay"].exp()[:, t, :, None, None]
            last = torch.einsum("bhv,bhk->bhvk", v[:, t - 1], k[:, t - 1]) if t else 0
            state = alpha * state + again * last + gates["write"][:, t, :, None, None] * new
        assert_close(got.values[:, t], torch.einsum("bhvk,bhk->bhv", state, q[:, t]), 1e-10)


ONE_SEGMENT = combinations(
    memory=MEMORY_NAMES, aggregation=AGGREGATIONS, state_init=CHOICES["state_init"], segmentation=SEGMENTATIONS
)


@pytest.mark.parametrize("fields", ONE_SEGMENT, ids=name_of)
def test_one_segment_is_the_plain_rnn(fields):
    ids = tokens(2, SIZE)
    got = Answers(ids, **fields)
    plain = Answers(ids, like=got, memory=fields["memory"], aggregation="none")
    assert_close(got.values, plain.values, 1e-12)


@pytest.mark.parametrize("fields", combinations(memory=MEMORY_NAMES, state_init=CHOICES["state_init"]), ids=name_of)
def test_ssc_that_selects_everything_is_grm(fields):
    ids = tokens(2, 4 * SIZE + 3)
    grm = Answers(ids, aggregation="grm", **fields)
    for k in (4, 9):
        ssc = Answers(ids, like=grm, aggregation="ssc", num_selected_segments=k, **fields)
        assert_close(ssc.values, grm.values, 1e-12)
    fewer = Answers(ids, like=grm, aggregation="ssc", num_selected_segments=3, **fields)
    assert_close(fewer.values[:, : 4 * SIZE], grm.values[:, : 4 * SIZE], 1e-12)
    assert not torch.allclose(fewer.values[:, 4 * SIZE :], grm.values[:, 4 * SIZE :], rtol=1e-3)


SOUPS = combinations(memory=MEMORY_NAMES, state_init=CHOICES["state_init"], aggregation=["soup"])


@pytest.mark.parametrize("fields", SOUPS, ids=name_of)
def test_soup_is_grm_for_one_map(fields):
    """And for memories of several maps it is not: gelu(mean) is not mean(gelu)."""
    ids = tokens(2, 3 * SIZE + 3)
    grm = Answers(ids, **fields | {"aggregation": "grm"})
    soup = Answers(ids, like=grm, **fields)
    if fields["memory"] in ONE_MAP_MEMORIES:
        assert_close(soup.values, grm.values, 1e-12)
    else:
        assert not torch.allclose(soup.values, grm.values, rtol=1e-3)


def test_residual_of_independent_linear_memories_is_linear_attention():
    ids = tokens(2, 4 * SIZE + 3)
    residual = Answers(ids, memory="linear", aggregation="residual", state_init="independent")
    plain = Answers(ids, like=residual, memory="linear", aggregation="none")
    assert_close(residual.values, plain.values, 1e-12)


def test_residual_of_checkpoints_counts_a_pair_once_per_segment():
    """A pair written in segment j counts s - j + 1 times at segment s."""
    got = Answers(tokens(2, 4 * SIZE + 3), memory="linear", aggregation="residual", state_init="checkpoint")
    q, k, v = got.given.q, got.given.k, got.given.v
    time = torch.arange(q.shape[1])
    times = (time[:, None] // SIZE - time // SIZE + 1) * (time[:, None] >= time)
    scores = torch.einsum("bthk,bihk->bhti", q, k) * times
    assert_close(got.values, torch.einsum("bhti,bihv->bthv", scores, v), 1e-12)


def test_segments_of_one_token_are_softmax_weighted_linear_scores():
    """y_t = sum_i softmax_i(<u_t, k_i>) <k_i, q_t> v_i over all i <= t (the paper's limit case, eq. 19)."""
    got = Answers(tokens(2, 19), memory="linear", aggregation="grm", segment_size=1, memory_chunk_size=1)
    q, k, v, u = got.given.q, got.given.k, got.given.v, got.given.u
    future = torch.ones(19, 19, dtype=torch.bool).triu(1)
    weights = torch.einsum("bthk,bihk->bhti", u, k).masked_fill(future, -torch.inf).softmax(-1)
    scores = weights * torch.einsum("bthk,bihk->bhti", q, k)
    assert_close(got.values, torch.einsum("bhti,bihv->bthv", scores, v), 1e-12)


POST_TRAINING = combinations(memory=MEMORY_NAMES, aggregation=["mean"], state_init=["checkpoint"])


@pytest.mark.parametrize("fields", POST_TRAINING, ids=name_of)
def test_post_training_caching_leaves_the_running_memory_alone(fields):
    """mean + checkpoint: what runs is the memory that a model without caching has."""
    ids = tokens(2, 3 * SIZE + 4)
    plain = Answers(ids, memory=fields["memory"], aggregation="none")
    mean = Answers(ids, like=plain, **fields)
    states = [x.cache.layers[0].tensors for x in (mean, plain)]
    names = [name for name in states[1] if name.startswith("state.")]
    assert names
    for name in names:
        assert_close(states[0][name], states[1][name], 1e-10)


READS = combinations(memory=MEMORY_NAMES, aggregation=["grm", "residual", "mean"])


@pytest.mark.parametrize("fields", READS, ids=name_of)
def test_reads_are_sums_of_answers(fields):
    """Memories of any form: the gated sum of what each of them answers, from states that the cache holds."""
    aggregation = fields["aggregation"]
    got = Answers(tokens(1, 3 * SIZE + 4), **fields)
    layer, mixer = got.cache.layers[0], got.model.model.layers[0].mixer
    q = got.given.q[:, -1]
    kept = [tuple(s[:, i] for s in layer.storage.group("kept")) for i in range(3)]
    online = tuple(s[:, 0] for s in layer.storage.group("state"))[: mixer.memory.num_read]
    answers = torch.stack([mixer.memory.read(state, q) for state in (*kept, online)], -1)  # [1, H, dv, 4]
    gates = torch.ones(2, 4, dtype=q.dtype)
    if aggregation == "mean":
        gates = gates / 4
    elif aggregation == "grm":
        k, u = got.given.source[0], got.given.u[0, -1]
        means = torch.stack([k[i * SIZE : (i + 1) * SIZE].mean(0) for i in range(4)], 1)  # the last one: 4 tokens
        gates = torch.einsum("hk,hsk->hs", u, means).softmax(-1)
    assert_close(got.values[:, -1], (answers * gates[:, None]).sum(-1), 1e-10)
