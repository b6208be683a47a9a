"""Requests in blocks of a pool, without vLLM: whatever is cut, batched and handed from block to block, a mixer answers
as if it had read each request in one go."""

import pytest
import torch

from helpers import assert_close, family, name_of, small_config
from mc_transformers.modeling_mc.mixer import MCMixer
from mc_transformers.modeling_mc.segments import SegmentTable
from mc_transformers.serving.vllm import pool as states
from mc_transformers.serving.vllm.blocks import OneLayer, make_blocks
from mc_transformers.serving.vllm.steps import cut


LENGTHS = (3, 16, 16, 29, 40)
MAX_LEN = 48
KINDS = family(aggregation=["grm"], state_init=["independent"]) + [
    {"memory": "gated_linear", "aggregation": "none"},
    {"memory": "titans", "aggregation": "ssc"},
    {"memory": "swla", "aggregation": "residual", "state_init": "checkpoint"},
    {"memory": "titans", "aggregation": "soup", "max_cached_segments": 2},
    {"memory": "linear", "aggregation": "mean", "segmentation": "logarithmic", "summaries_per_segment": 2},
    {"memory": "gated_delta", "max_cached_segments": 2, "cache_eviction": "least_read"},
    {"memory": "dla", "online_memory": "running", "max_cached_segments": 3},
    {"memory": "rwkv7", "aggregation": "ssc", "online_memory": "running", "segmentation": "logarithmic"},
]


class Pool:
    """Blocks of one layer, handed out as vLLM does: new ones when they are needed, and nothing is cleared."""

    def __init__(self, mixer: MCMixer, kept_dtype: torch.dtype | None = None, per_block: int = 1) -> None:
        self.mixer, self.blocks = mixer, make_blocks(mixer, MAX_LEN, torch.float32, kept_dtype, per_block)
        num = 64
        raw = torch.full((num, self.blocks.nbytes), -1, dtype=torch.int8)  # NaN in every float dtype
        self.views, self.size = self.blocks.views(raw), per_block * mixer.config.segment_size
        self.free = torch.randperm(num, generator=torch.Generator().manual_seed(0)).tolist()
        self.tables: dict[int, list[int]] = {}

    def step(self, pieces: list[tuple[int, int, torch.Tensor]], cuts: bool) -> list[torch.Tensor]:
        """Answers for (request, tokens before, tokens `[n, hidden]`)."""
        starts, before = [0], []
        for request, position, x in pieces:
            table = self.tables.setdefault(request, [])
            while len(table) * self.size < position + len(x):
                table.append(self.free.pop())
            starts.append(starts[-1] + len(x))
            before.append(position)
        width = max(len(self.tables[request]) for request, _, _ in pieces)
        tables = [(self.tables[r] + [0] * width)[:width] for r, _, _ in pieces]  # what is behind the end is any block
        x = torch.cat([x for _, _, x in pieces])
        out = torch.full_like(x, torch.nan)
        for call in self.blocks.planner(cuts).calls(starts, before, torch.tensor(tables)):
            layer = self.blocks.load(self.views, call)
            call.scatter(self.mixer(call.gather(x), call.table, OneLayer(0, layer)), out)
            self.blocks.save(self.views, call, layer)
        return [out[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def make(**fields) -> tuple[MCMixer, list[torch.Tensor], list[torch.Tensor]]:
    """A mixer, requests, and its answers to each in one go."""
    mixer = MCMixer(small_config(**fields), 0).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.4)
    requests = [torch.randn(n, mixer.config.hidden_size) for n in LENGTHS]
    table = [SegmentTable.build(1, n, mixer.config.segment_size, torch.device("cpu")) for n in LENGTHS]
    with torch.no_grad():
        whole = [mixer(x[None], t)[0] for x, t in zip(requests, table, strict=True)]
    return mixer, requests, whole


@torch.inference_mode()
def serve(pool: Pool, requests: list[torch.Tensor], sizes: list[int], cuts: bool) -> list[torch.Tensor]:
    """All requests at once, pieces of these sizes in turn, the last six tokens one at a time."""
    answers, position, turn = [[] for _ in requests], [0] * len(requests), 0
    while any(p < len(x) for p, x in zip(position, requests, strict=True)):
        pieces = []
        for i, x in enumerate(requests):
            size = max(1, min(sizes[(turn + i) % len(sizes)], len(x) - 6 - position[i]))
            if position[i] < len(x):
                pieces.append((i, position[i], x[position[i] : position[i] + size]))
        for (i, _, x), y in zip(pieces, pool.step(pieces, cuts), strict=True):
            answers[i].append(y)
            position[i] += len(x)
        turn += 1
    return [torch.cat(parts) for parts in answers]


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_answers_of_one_go(fields, monkeypatch):
    mixer, requests, whole = make(**fields)
    for sizes, cuts, per_block in (([5, 1, 13], True, 1), ([40, 11], True, 2), ([7, 19], False, 3)):
        monkeypatch.setattr(states, "PIECE", 4 << 20 if cuts else 1)  # at once, or slot by slot
        pool = Pool(mixer, per_block=per_block)
        for found, wanted in zip(serve(pool, requests, sizes, cuts), whole, strict=True):
            assert_close(found, wanted, 2e-4)


@pytest.mark.parametrize("fields", [x for x in KINDS if x["memory"] in ("swla", "titans", "dla")], ids=name_of)
@pytest.mark.parametrize("per_block", [1, 2])
@torch.inference_mode()
def test_shared_blocks(fields, per_block):
    """Two requests with the same beginning share its full blocks, and neither changes them."""
    mixer, requests, whole = make(**fields)
    pool, text = Pool(mixer, per_block=per_block), requests[4]
    size = per_block * mixer.config.segment_size
    other = torch.cat([text[: 2 * size], requests[3]])[:MAX_LEN]
    table = SegmentTable.build(1, len(other), mixer.config.segment_size, torch.device("cpu"))
    wanted = mixer(other[None], table)[0, 2 * size :]
    first = pool.step([(0, 0, text[: 2 * size + 3])], True)[0]
    pool.tables[1] = pool.tables[0][:2]
    both = pool.step([(0, 2 * size + 3, text[2 * size + 3 :]), (1, 2 * size, other[2 * size :])], True)
    assert_close(both[1], wanted, 2e-4)
    assert_close(torch.cat([first, both[0]]), whole[4], 2e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_coded_states(dtype):
    """Finished states in half the bytes or a quarter: close to what they are, and not the same."""
    mixer, requests, whole = make(memory="gated_linear", num_selected_segments=2)
    found = serve(Pool(mixer, dtype), requests, [9], True)
    for a, b in zip(found, whole, strict=True):
        assert_close(a, b, 0.1)
    assert not torch.allclose(found[-1], whole[-1], atol=1e-5)
    plain, coded = Pool(mixer).blocks, Pool(mixer, dtype).blocks
    assert plain.parts["state.0"].shape == coded.parts["kept.0"].shape  # one state, and it is what is kept
    assert "kept.0" not in plain.parts and coded.parts["kept.0"].dtype == dtype


@pytest.mark.parametrize("memory", ["gated_linear", "titans", "gru"])
def test_a_token_fetches_the_chosen_states_only(memory, monkeypatch):
    """With "ssc" a decoded token copies k states of each row and head out of the pool, however many there are."""
    mixer, requests, _ = make(memory=memory, aggregation="ssc", num_selected_segments=2)
    fetched, fetch = [], states.fetch
    monkeypatch.setattr(states, "fetch", lambda *args: fetched.append(fetch(*args)) or fetched[-1])
    serve(Pool(mixer), [requests[4]] * 2, [17], True)
    assert len(fetched) >= 6 and {x.shape[1] for x in fetched} == {2}


def test_cut():
    """At borders if asked, in the order of the request; pieces of one request never go together."""
    borders = make()[0].history.borders
    waves = cut([0, 1, 21], [30, 6], borders)
    assert [[(p.row, p.place, p.begin, p.end) for p in wave] for wave in waves] == [
        [(0, 0, 30, 31), (1, 1, 6, 8)],
        [(1, 3, 8, 16)],
        [(1, 11, 16, 24)],
        [(1, 19, 24, 26)],
    ]
    assert [len(wave) for wave in cut([0, 1, 21], [30, 6], None)] == [2]


def test_a_beginning_that_is_written_in_the_same_step():
    """Its readers wait for it, and theirs for them; who shares nothing does not wait."""
    borders = make()[0].history.borders
    starts, before = [0, 12, 16, 32, 33], [24, 16, 0, 8]
    blocks = [[5, 6, 7, 9, 10], [5, 6, 8, 0, 0], [5, 6, 0, 0, 0], [3, 4, 0, 0, 0]]
    waves = cut(starts, before, borders, blocks)
    assert [[(p.row, p.begin, p.end) for p in wave] for wave in waves] == [
        [(2, 0, 8), (3, 8, 9)],
        [(2, 8, 16)],
        [(1, 16, 20), (0, 24, 32)],
        [(0, 32, 36)],
    ]


def zero_kept(views, call):
    views["kept.0"][call.finished.into] = 0


def mix_rows(views, call):
    call.finished.blocks = call.finished.blocks.roll(1, 0)


def leave_stale(views, call):
    call.finished.absent.zero_()


@pytest.mark.parametrize("place, fault", [("save", zero_kept), ("load", mix_rows), ("load", leave_stale)])
def test_planted_faults_are_seen(monkeypatch, place, fault):
    """These tests must fail when kept states are zero, rows are mixed up, or a block is not cleared."""
    mixer, requests, whole = make(memory="linear", online_memory="running")  # kept states have a place of their own
    pool = Pool(mixer)
    original = getattr(pool.blocks, place)

    def planted(views, call, *layer):
        if place == "load":
            fault(views, call)
        out = original(views, call, *layer)
        if place == "save":
            fault(views, call)
        return out

    monkeypatch.setattr(pool.blocks, place, planted)
    found = torch.cat(serve(pool, requests, [9], True))
    assert not torch.allclose(found, torch.cat(whole), atol=1e-2)  # a NaN is not close either
