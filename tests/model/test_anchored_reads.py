"""Reads that start from the plain model: a running online memory, a bias of its logit, cached answers added."""

import pytest
import torch
from test_equations import SIZE, check
from test_identities import Answers

from helpers import MEMORY_NAMES, accepts, assert_close, build, family, name_of, small_config, tokens
from mc_transformers import MCCache, MCConfig
from mc_transformers.modeling_mc.compat import CACHE_NAME
from mc_transformers.modeling_mc.context_parallel import check_shards


ANCHORS = {
    "running": {"online_memory": "running"},
    "bias": {"online_gate_bias": 0.7},
    "added": {"cached_answers": "added", "cached_answers_start": 0.6},
    "running-bias": {"online_memory": "running", "online_gate_bias": 0.7},
    "running-added": {"online_memory": "running", "cached_answers": "added", "cached_answers_start": 0.6},
}


def anchored(anchors: list[str], **axes) -> list:
    return [
        pytest.param(fields | ANCHORS[anchor], id=f"{anchor}-{name_of(fields)}")
        for fields in family(**axes)
        for anchor in anchors
        if accepts(**fields | ANCHORS[anchor])
        and (fields["segmentation"] == "constant" or anchor == anchors[-1])  # levels are the same business for all
    ]


@pytest.mark.parametrize("fields", anchored(["bias", "running", "running-added"]))
def test_parallel_is_token_by_token(fields):
    """Padding in front, behind and inside, rows that end in different segments."""
    mask = torch.ones(3, 2 * SIZE + 5, dtype=torch.long)
    mask[0, :5], mask[1, -9:], mask[2, 3:15:2] = 0, 0, 0
    check(build(small_config(**fields), dtype=torch.float64), tokens(*mask.shape), mask)


@pytest.mark.parametrize("fields", anchored(["running", "running-added"], aggregation=["grm"]))
def test_parallel_is_token_by_token_packed(fields):
    borders = torch.tensor([0, 3, 11, 12, 30])
    check(build(small_config(**fields), dtype=torch.float64), tokens(1, 30), cu_seq_lens_q=borders)


MORE = {
    "relu": {"gate_function": "relu"},
    "sigmoid": {"gate_function": "sigmoid"},
    "blocks": {"summaries_per_segment": 2},
    "oldest": {"max_cached_segments": 2},
    "least_read": {"max_cached_segments": 2, "cache_eviction": "least_read"},
    "shared": {"route_sharing": "model", "num_hidden_layers": 2},
    "chosen": {"memory": "lstm", "vector_read": "add"},
    "weighed": {"memory": "lstm", "vector_read": "add_weighted"},
}


@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("anchor", ["running-bias", "running-added"])
def test_with_other_options(anchor, more, aggregation):
    fields = {"memory": "gated_linear", "aggregation": aggregation} | ANCHORS[anchor] | MORE[more]
    if not accepts(**fields):
        pytest.skip("the config refuses it")
    check(build(small_config(**fields), dtype=torch.float64), tokens(2, 4 * SIZE + 3))


def naive(given, aggregation: str, running: bool, bias, scale, top_k: int = 2) -> torch.Tensor:
    """Linear memories, token by token: what each holds, and what its answer is multiplied with."""
    q, k, v, u = given.q, given.k, given.v, given.u
    out = torch.zeros_like(v)
    for r, t, h in torch.cartesian_prod(*map(torch.arange, v.shape[:3])).tolist():
        start = t // SIZE * SIZE
        segments = [slice(i, i + SIZE) for i in range(0, start, SIZE)]
        past = [k[r, part, h].T @ v[r, part, h] for part in segments]
        held = slice(0 if running else start, t + 1)
        online = q[r, t, h] @ (k[r, held, h].T @ v[r, held, h])
        if aggregation == "residual":
            out[r, t, h] = online + scale[h] * sum(q[r, t, h] @ memory for memory in past)
            continue
        scores = torch.stack([u[r, t, h] @ k[r, part, h].mean(0) for part in [*segments, slice(start, t + 1)]])
        if aggregation == "ssc" and len(past) > top_k:
            scores[scores[:-1].argsort(descending=True)[top_k:]] = -torch.inf
        gates = scores[:-1].softmax(0) if scale is not None else (scores + bias[h] * (scores == scores[-1])).softmax(0)
        cached = sum(gate * (q[r, t, h] @ memory) for gate, memory in zip(gates, past, strict=False))
        out[r, t, h] = online + scale[h] * cached if scale is not None else gates[-1] * online + cached
    return out


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("aggregation", ["residual", "grm", "ssc"])
def test_equations(aggregation, anchor):
    if not accepts(aggregation=aggregation, **ANCHORS[anchor]) or (aggregation, anchor) == ("residual", "running"):
        pytest.skip("the config refuses it, or there is nothing to weigh")
    answers = Answers(tokens(2, 3 * SIZE + 3), aggregation=aggregation, **ANCHORS[anchor])
    learned = {name: x.detach() for name, x in answers.model.named_parameters()}
    mixer = "model.layers.0.mixer."
    bias = learned.get(mixer + "online_bias.bias", torch.zeros(2))
    scale = learned.get(mixer + "cached_scale.bias")
    expected = naive(answers.given, aggregation, "online_memory" in ANCHORS[anchor], bias, scale)
    assert_close(answers.values, expected, 1e-10)


@pytest.mark.parametrize("segmentation", ["constant", "logarithmic"])
@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_starts_as_the_uncached_model(memory, segmentation):
    """With f = 0 a model is its uncached self over any length, before anything is learned."""
    ids = tokens(2, 4 * SIZE + 3)
    plain = build(small_config(memory, aggregation="none"), dtype=torch.float64)
    for aggregation in ("grm", "ssc", "residual"):
        fields = {"aggregation": aggregation, "segmentation": segmentation, "online_memory": "running"}
        if not accepts(memory=memory, **fields):
            continue
        model = build(small_config(memory, **fields, cached_answers="added"), dtype=torch.float64, wild=False)
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all("u_proj" in name or "cached_scale" in name for name in missing)
        assert_close(model(ids).logits, plain(ids).logits, 1e-12)
        if aggregation != "residual":  # gates that are closed by a bias
            model = build(small_config(memory, **fields, online_gate_bias=50.0), dtype=torch.float64, wild=False)
            model.load_state_dict(plain.state_dict(), strict=False)
            assert_close(model(ids).logits, plain(ids).logits, 1e-10)


@pytest.mark.parametrize("memory", MEMORY_NAMES)
@pytest.mark.parametrize("anchor", ["running-bias", "running-added"])
@torch.no_grad()
def test_pieces_and_single_tokens(anchor, memory, tmp_path):
    """A cache over pieces, beams that change places, rolling back, and a memory file."""
    fields = {"aggregation": "ssc", "num_hidden_layers": 2} | ANCHORS[anchor]
    model = build(small_config(memory, **fields), dtype=torch.float64)
    ids = tokens(2, 3 * SIZE + 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    cache, seen, found = MCCache(config=model.config), 0, []
    for size in (5, 1, 9, 2, 1, 1, 6):
        seen += size
        found.append(model(ids[:, seen - size : seen], attention_mask=mask[:, :seen], cache=cache).logits)
    assert_close(torch.cat(found, 1)[:, 3:], whole[:, 3:seen], 1e-10)
    cache.save_pretrained(tmp_path, model)
    again = MCCache.from_pretrained(tmp_path, model)
    again.batch_select_indices(torch.tensor([1, 0]))
    turned = model(ids[[1, 0], seen:], attention_mask=mask[[1, 0]], cache=again).logits
    assert_close(turned, whole[[1, 0], seen:], 1e-10)
    for layer in cache.layers:
        layer.activate_past_recording()
    model(ids[:, seen : seen + 4], attention_mask=mask[:, : seen + 4], cache=cache)
    cache.crop(-3)
    assert_close(model(ids[:, seen + 1 :], attention_mask=mask, cache=cache).logits, whole[:, seen + 1 :], 1e-10)


def test_generate_equals_the_reference():
    fields = {"aggregation": "ssc", "online_memory": "running", "cached_answers": "added", "cached_answers_start": 1.0}
    model, prompt = build(small_config("gated_linear", **fields)), tokens(2, 11)
    expected = prompt
    for _ in range(20):
        model.config.mc_backend = "reference"
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    model.config.mc_backend = "auto"
    for how in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        ids = prompt if "prompt_lookup_num_tokens" not in how else prompt[:1]
        out = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None, **how)
        assert torch.equal(out, expected[: len(ids)]), how


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"online_memory": "running", "aggregation": "none"}, "online_memory"),
        ({"online_memory": "running", "state_init": "checkpoint"}, "online_memory"),
        ({"online_memory": "endless"}, "online_memory"),
        ({"cached_answers": "added", "aggregation": "soup"}, "cached_answers"),
        ({"cached_answers": "added", "aggregation": "mean"}, "cached_answers"),
        ({"cached_answers": "added", "online_gate_bias": 1.0}, "online_gate_bias"),
        ({"online_gate_bias": 1.0, "aggregation": "residual"}, "online_gate_bias"),
        ({"online_gate_bias": 1.0, "memory": "lstm", "vector_read": "add"}, "online_gate_bias"),
    ],
)
def test_refused(fields, named):
    with pytest.raises(ValueError, match=f"`{named}`=.* is not valid, allowed: "):
        MCConfig(**fields)


def test_refused_elsewhere():
    config = small_config("linear", online_memory="running")
    with pytest.raises(ValueError, match="online_memory"):
        check_shards(config, 2 * SIZE)
    model = build(config)
    caches = [model(tokens(1, 9), use_cache=True)[CACHE_NAME] for _ in range(2)]
    with pytest.raises(ValueError, match="online_memory='segment'"):
        MCCache.cat(caches, model)
