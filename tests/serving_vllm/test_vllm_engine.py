"""What the scheduler of vLLM does to requests changes no token: chunks, hits, preemption, arrivals, stale blocks."""

import random

import pytest
import torch

from helpers import name_of
from mc_transformers import MCCache
from mc_transformers.serving.vllm.blocks import SegmentBlocks
from vllm_engine import NEW, answers, engine, expected, greedy, make, metric, prompts


KINDS = [
    {"memory": "gated_linear"},
    {"aggregation": "ssc", "route_sharing": "model"},
    {"memory": "titans", "aggregation": "soup", "max_cached_segments": 3},
    {"memory": "gated_delta", "segmentation": "logarithmic", "state_init": "checkpoint"},
    {"memory": "swla", "online_memory": "running"},
]


def spoil(module: torch.nn.Module) -> None:
    """Leave what an unlucky request before might have left in every block."""
    for layer in module.modules():
        for part in getattr(layer, "pool", {}).values():
            part.fill_(torch.nan if part.is_floating_point() else 77)


def serve(llm, texts: list[list[int]], sizes: list[int], chance: float) -> list[list[int]]:
    """Requests that arrive between steps, at random."""
    draw, waiting, done = random.Random(0), list(range(len(texts))), {}
    core = llm.llm_engine
    while len(done) < len(texts):
        while waiting and (draw.random() < chance or not core.has_unfinished_requests()):
            number = waiting.pop(0)
            core.add_request(str(number), {"prompt_token_ids": texts[number]}, greedy(sizes[number]))
        for output in core.step():
            if output.finished:
                done[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
    return [done[number] for number in range(len(texts))]


@pytest.mark.parametrize("fields", KINDS, ids=name_of)
def test_what_the_scheduler_does(tmp_path, fields):
    """One engine with stale blocks, steps of 40 tokens, and too few blocks for eight requests at once."""
    model = make(tmp_path, **fields)
    # where a request holds a few blocks at most, eight of them want fewer still, and admission by their first piece
    held_at_once = "max_cached_segments" in fields or fields.get("segmentation") == "logarithmic"
    few = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "max_model_len": 144}
    few |= {"num_gpu_blocks_override": 10 if held_at_once else 40, "scheduler_reserve_full_isl": not held_at_once}
    with engine(tmp_path, block_size=8, **few) as llm:
        llm.apply_model(spoil)
        # a prompt in chunks; others that begin alike; a conversation that goes on: nothing is read again
        beginning, *rest = prompts(70, 1, 20, 33)
        first, hits = answers(llm, [beginning])
        assert first == expected(model, [beginning]) and hits == 0
        texts = [beginning + rest[0], beginning + first[0] + rest[1]]
        found, hits = answers(llm, texts)
        assert found == expected(model, texts)
        # of the second, 70 + 20 - 1 were written; the last blocks may have gone to others since
        assert 64 + 64 <= hits <= 64 + 88
        # rows of one length in one call, which preempt each other
        texts = prompts(*[60] * 8, seed=2)
        assert answers(llm, texts)[0] == expected(model, texts)
        # arrivals between steps
        texts = prompts(*[1 + 37 * i % 90 for i in range(24)], seed=3)
        assert serve(llm, texts, [NEW] * len(texts), 0.3) == expected(model, texts)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("fields", KINDS[1:3], ids=name_of)
def test_without_prefix_caching(tmp_path, fields):
    """Pieces that go on behind the ends of blocks."""
    model, texts = make(tmp_path, **fields), prompts(70, 3, 120, 41, 41, 64)
    with engine(tmp_path, max_num_batched_tokens=50, enable_prefix_caching=False) as llm:
        llm.apply_model(spoil)
        assert answers(llm, texts) == (expected(model, texts), 0)


def padded(model, texts: list[list[int]], new: int) -> list[list[int]]:
    """`generate` in batches padded on the left."""
    found = []
    for start in range(0, len(texts), 50):
        part = texts[start : start + 50]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(t)) + t for t in part])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in part])
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found += model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    return found


def test_a_thousand_mixed_requests(tmp_path):
    """Long and short, half of them with one of five beginnings, at random times, with too few blocks."""
    model, draw, longest = make(tmp_path, num_hidden_layers=1, memory="gated_linear"), random.Random(0), 24
    beginnings = prompts(64, 17, 40, 33, 56, seed=2)
    texts = prompts(*[draw.randint(1, 60) for _ in range(1000)], seed=3)
    texts = [draw.choice(beginnings) * draw.randint(0, 1) + text for text in texts]
    sizes = [draw.randint(1, longest) for _ in texts]
    wanted = [answer[:n] for answer, n in zip(padded(model, texts, longest), sizes, strict=True)]
    with engine(tmp_path, max_num_seqs=16, max_num_batched_tokens=64, num_gpu_blocks_override=120) as llm:
        found = serve(llm, texts, sizes, 0.6)
        assert metric(llm, "num_preemptions") > 0 and metric(llm, "prefix_cache_hits") > 0
    assert [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b] == []


@torch.no_grad()
def in_pieces(model, text: list[int], cache: MCCache) -> list[int]:
    """Greedy tokens of a text that is read segment by segment."""
    ids, size, found = torch.tensor([text]), model.config.segment_size, []
    for start in range(0, len(text), size):
        logits = model(ids[:, start : start + size], cache=cache).logits
    while len(found) < NEW:
        found.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([found[-1:]]), cache=cache).logits
    return found


@pytest.mark.parametrize("name", ["int8", "bfloat16"])
def test_coded_states(tmp_path, name):
    """`MCCache(state_dtype=...)` in blocks: the same tokens, which are not those of fp32."""
    model, texts = make(tmp_path, memory="gated_linear"), prompts(17, 40, 64, 71)
    dtype = getattr(torch, name)
    with engine(tmp_path, block_size=8, additional_config={"mc_state_dtype": name}) as llm:
        found = answers(llm, texts)[0]
    assert found == [in_pieces(model, text, MCCache(model.config, state_dtype=dtype)) for text in texts]


def zero_kept(blocks, pool, call):
    if call.finished is not None:
        for name in blocks._kept():
            pool[blocks._place(name)][call.finished.into] = 0


def mix_rows(blocks, pool, call):
    call.read, call.finished.blocks = call.read.roll(1, 0), call.finished.blocks.roll(1, 0)


def leave_stale(blocks, pool, call):
    call.finished.absent.zero_()
    for part in pool.values():
        part[call.finished.blocks[:, -1]] = torch.nan


FAULTS = [("save", zero_kept), ("load", mix_rows), ("load", leave_stale)]


@pytest.mark.parametrize("place, fault", FAULTS, ids=["kept states zeroed", "rows mixed up", "block not cleared"])
def test_planted_faults_are_seen(tmp_path, monkeypatch, place, fault):
    """What these tests are for: with a wrong state the tokens differ."""
    model, texts = make(tmp_path, online_memory="running"), prompts(20, 30, 40, 50)
    original = getattr(SegmentBlocks, place)

    def planted(self, pool, call, *layer):
        if place == "load":
            fault(self, pool, call)
        out = original(self, pool, call, *layer)
        if place == "save":
            fault(self, pool, call)
        return out

    monkeypatch.setattr(SegmentBlocks, place, planted)
    with engine(tmp_path) as llm:
        assert answers(llm, texts)[0] != expected(model, texts)


REFUSED = {
    "mc_state_dtype": ({}, {"additional_config": {"mc_state_dtype": "int4"}}, "'int8'"),
    "attention": ({"layer_types": ["memory_caching", "full_attention"], "attention": "qwen3_next"}, {}, "'qwen3'"),
    "segmentation": ({"segmentation": "content"}, {}, "'logarithmic'"),
    "block_size": ({}, {"block_size": 12}, "multiples of segment_size=8"),
    "quantization": ({}, {"quantization": "fp8", "dtype": "bfloat16"}, "None"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path, field):
    fields, options, allowed = REFUSED[field]
    make(tmp_path, **fields)
    with pytest.raises((ValueError, RuntimeError), match=f"`{field}`=.*not supported, allowed: .*{allowed}"):
        with engine(tmp_path, **options):
            pass
