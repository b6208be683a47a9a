"""Segments whose borders content chooses: the decision against a loop, and every workflow against one plain pass."""

import pytest
import torch
from test_equations import check
from transformers import StaticCache, Trainer, TrainingArguments

from helpers import MEMORY_NAMES, assert_close, build, name_of, small_config, tokens
from mc_transformers import MCCache, MCConfig, MCForCausalLM, MemoryCaching, PrefixStore, Stream, read_gates
from mc_transformers.modeling_mc.border_rule import BorderRule, rate_loss
from mc_transformers.modeling_mc.context_parallel import check_shards
from mc_transformers.modeling_mc.segments import SegmentTable


RULES = {"dissimilarity": {"border_rule": "dissimilarity"}, "budget": {"border_rule": "budget", "border_budget": 3.0}}
CONTENT = {"segmentation": "content", "least_segment_size": 2, "num_hidden_layers": 2}
HOLES = [[0] * 5 + [1] * 24, [1] * 20 + [0] * 9, [1] * 3 + [0, 1] * 7 + [1] * 12, [1] * 29]


def model_of(rule: str = "budget", **fields):
    return build(small_config(**CONTENT | RULES[rule] | fields), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ the decision
def naive(rule: BorderRule, x: torch.Tensor) -> list[int]:
    """Tokens before every border of one text `[T, hidden]`, from the definition."""
    config, ends, begin, spent = rule.config, [], 0, 0.0
    for t in range(len(x)):
        q = rule.query @ x[t] / (rule.query @ x[t]).norm()
        k = rule.key @ x[t - 1] / (rule.key @ x[t - 1]).norm() if t else torch.zeros_like(q)
        if config.border_rule == "budget":
            spent += (torch.sigmoid(rule.strength @ x[t] + rule.strength_bias[0]) * (q - k).norm()).item()
            wanted = spent >= config.border_budget
        else:
            wanted = t > 0 and ((1 - q @ k) / 2).item() >= 0.5
        long = t + 1 - begin
        if (wanted and long >= config.least_segment_size) or long == config.segment_size:
            ends.append(t + 1)
            begin, spent = t + 1, 0.0
    return ends


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("least", [1, 3, 8])
@torch.no_grad()
def test_borders_are_those_of_a_loop(rule, least):
    """In one pass, with padding, packed, and in pieces through what a cache holds; 8: all segments are as long."""
    module = BorderRule(small_config(**CONTENT | RULES[rule] | {"least_segment_size": least})).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, mask = torch.randn(4, 29, 24, dtype=torch.float64), torch.tensor(HOLES)
    expected = [naive(module, x[row, mask[row].bool()]) for row in range(4)]
    lengths = {b - a for ends in expected for a, b in zip([0, *ends], ends, strict=False)}
    assert len(lengths) > (1 if least < 8 else 0) and min(lengths) >= least and max(lengths) <= 8

    def ends(borders, row: int) -> list[int]:
        return [int(n) for n in borders.ends[row] if n <= 29]

    for size in (29, 1, 4, 11):
        held, found, position = {}, [[] for _ in range(4)], torch.zeros(4, dtype=torch.int64)
        for part, real in zip(x.split(size, 1), mask.split(size, 1), strict=True):
            table = SegmentTable.build(4, part.shape[1], 8, x.device, real, position if held else None)
            borders = module(part, table, held).borders
            for row in range(4):
                found[row] += [int(position[row]) + n for n in ends(borders, row)]
            held, position = borders.left, position + real.sum(1)
        assert found == expected, size
    starts = [0, 3, 3, 12, 29]
    table = SegmentTable.build(1, 29, 8, x.device, cu_seq_lens=torch.tensor(starts))
    packed = [a + n for a, b in zip(starts, starts[1:], strict=False) for n in naive(module, x[3, a:b])]
    assert ends(module(x[3:], table, {}).borders, 0) == packed


def test_rate_loss():
    """One where borders are as frequent as wanted; above that rate wishes are lowered, below it raised."""
    wish = torch.tensor(0.3, requires_grad=True)
    assert rate_loss(torch.tensor(0.25), torch.tensor(0.25), 4).item() == pytest.approx(1)
    for rate, sign in ((0.4, 1), (0.1, -1)):
        (gradient,) = torch.autograd.grad(rate_loss(torch.tensor(rate), wish, 4), wish)
        assert gradient.sign() == sign


@pytest.mark.parametrize("rule", RULES)
def test_training_brings_the_wanted_rate(rule):
    """The loss has it in training and not in evaluation."""
    config = small_config(**CONTENT | RULES[rule] | {"mean_segment_size": 3 if rule == "budget" else 6})
    config.border_loss_weight, config.border_budget = 1.0, 4.0
    model, ids = build(config, wild=False), tokens(8, 64)
    with torch.no_grad():
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        out = model(ids, labels=ids, use_cache=False)
        total = model.train()(ids, labels=ids, use_cache=False)
        assert_close(total.loss, out.loss + out.border_loss, 1e-6)
    rule = model.model.border_rule
    optimizer, rates = torch.optim.Adam(rule.parameters(), 1e-2), []
    embeds = model.get_input_embeddings()(ids).detach()
    for _ in range(100):
        table = rule(embeds, SegmentTable.build(8, 64, 8, ids.device), {})
        rates.append(table.borders.before[:, -1].float().mean().item() / 64)
        optimizer.zero_grad()
        table.border_loss.backward()
        optimizer.step()
    wanted = 1 / config.mean_segment_size
    assert abs(rates[-1] - wanted) < 0.4 * abs(rates[0] - wanted), rates


def test_trainer_predicts_logits_alone(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(5, 20)]
    options = {"use_cpu": True, "report_to": [], "per_device_eval_batch_size": 2, "max_steps": 1}
    run = Trainer(model_of().float(), TrainingArguments(tmp_path, **options), train_dataset=rows)
    assert run.predict(rows).predictions.shape == (5, 20, 61)  # a tuple if the loss of borders came along


# --------------------------------------------------------------------------------------------- one pass, in float64
READS = ["grm", "ssc", "soup", "residual", "mean"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_parallel_is_token_by_token(memory, rule):
    """Values and gradients; the reference also decides token by token."""
    mask = torch.tensor([HOLES[0], HOLES[2]])
    read = "grm" if rule == "budget" else "ssc"
    check(model_of(rule, memory=memory, aggregation=read, num_hidden_layers=1), tokens(2, 29), mask)


OPTIONS = {
    "soup": {"memory": "dla", "aggregation": "soup"},
    "residual": {"aggregation": "residual", "state_init": "checkpoint"},
    "mean": {"memory": "lstm", "aggregation": "mean"},
    "running": {"memory": "gated_delta", "online_memory": "running", "cached_answers": "added"},
    "sub-blocks": {"aggregation": "ssc", "summaries_per_segment": 4, "route_sharing": "model"},
    "bounded": {"memory": "swla", "max_cached_segments": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """Token by token, packed; and in pieces with padding as every row alone."""
    model = model_of("budget" if len(name) % 2 else "dissimilarity", **OPTIONS[name])
    check(model, tokens(1, 30), cu_seq_lens_q=torch.tensor([0, 3, 11, 12, 30]))
    check_pieces(model)


@torch.no_grad()
def check_pieces(model, holes: list = HOLES, tolerance: float = 1e-9) -> None:
    mask = torch.tensor(holes)
    ids = tokens(*mask.shape)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for borders in ([4, 8, 9, 15], range(1, 29)):
        cache, found = MCCache(config=model.config), []
        for start, stop in zip([0, *borders], [*borders, 29], strict=True):
            found.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
        for row, real in enumerate(mask.bool()):
            assert_close(torch.cat(found, 1)[row, real], whole[row, real], tolerance)
    assert cache.num_segments == min(
        model.config.max_cached_segments or 99, int(cache.memory_layers[-1].tensors["cut.number"].max())
    )
    for row, real in enumerate(mask.bool()):
        assert_close(model(ids[row, real][None], use_cache=False).logits[0], whole[row, real], tolerance)


@pytest.mark.parametrize("layer_types", ["full_attention memory_caching", "memory_caching sliding_attention"])
def test_hybrids(layer_types):
    """The rule stands in front of all layers, so the first one need not have a memory."""
    check_pieces(model_of(layer_types=layer_types.split(), sliding_window=5), [HOLES[0], HOLES[1], HOLES[3]], 1e-5)


# ------------------------------------------------------------------------------------------------------- workflows
@pytest.fixture(scope="module", params=RULES)
def model(request):
    return model_of(request.param, aggregation="ssc", memory="gated_linear", pad_token_id=0)


def test_generate(model):
    """Greedy with padding on the left, beams whose rows are reordered, and a static cache."""
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[0, :6], mask[2, :1] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    ids = tokens(3, 13)
    plain = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), plain)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), plain)
    beams = {"num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(
        model.generate(ids, **options, **beams), model.generate(ids, use_cache=False, **options, **beams)
    )


@torch.no_grad()
def test_static_cache_has_room_for_the_shortest_segments():
    """Its bound is tokens / least length, and one graph serves all tokens."""
    model, ids = model_of(num_hidden_layers=1), tokens(2, 30)
    cache, static = MCCache(config=model.config), StaticCache(config=model.config, max_cache_len=30)
    step = torch.compile(model, backend="eager", fullgraph=True)
    for part in ids.split([9] + [1] * 21, 1):
        found = (model if part.shape[1] > 1 else step)(part, cache=static).logits
        assert_close(found, model(part, cache=cache).logits, 1e-12)
    assert static.layers[0].tensors["kept.0"].shape[1] == 30 // model.config.least_segment_size


@torch.no_grad()
def test_what_the_host_may_not_look_at(monkeypatch):
    """Under `torch.compile` and on a GPU the grid has room for the shortest segments."""
    model, ids = model_of(), tokens(2, 29)
    expected = model(ids, use_cache=False).logits
    for module in ("border_rule", "segments"):
        monkeypatch.setattr(f"mc_transformers.modeling_mc.{module}.unobserved", lambda: True)
    assert_close(model(ids, use_cache=False).logits, expected, 1e-12)
    table = model.model._segment_table(model.get_input_embeddings()(ids), None, None, {}, False)
    assert table.num_segments == 15


@torch.no_grad()
def test_memory_file(model, tmp_path):
    """A text goes on from a file as if it had been read at once; what no cache can hold is refused."""
    ids = tokens(2, 40)
    cache = MCCache(config=model.config)
    model(ids[:, :23], cache=cache)
    cache.save_pretrained(tmp_path)
    loaded = MCCache.from_pretrained(tmp_path, model)
    loaded.batch_select_indices(torch.tensor([1, 0]))
    again = model(ids[:, 23:].flip(0), cache=loaded).logits.flip(0)
    assert_close(again, model(ids, use_cache=False).logits[:, 23:], 1e-9)
    for name, value in (("begin", 24), ("number", 20), ("spent", -1)):
        cache.layers[0].tensors[f"cut.{name}"] = torch.full((2,), value)
        with pytest.raises(ValueError, match="'0.cut.*' describe a segment that cannot go on"):
            cache.save_pretrained(tmp_path)
        cache = MCCache.from_pretrained(tmp_path, model)
    cache.layers[1].tensors["cut.begin"] = cache.layers[1].tensors["cut.begin"] - 1
    with pytest.raises(ValueError, match="cut.begin' differs from that of other layers"):
        cache.save_pretrained(tmp_path)


@torch.no_grad()
def test_half_precision_has_the_same_borders():
    """Embeddings are the same bits in pieces, whatever the layers round."""
    model, ids = model_of().bfloat16(), tokens(2, 60)
    whole, pieces = MCCache(config=model.config), MCCache(config=model.config)
    model(ids, cache=whole)
    for part in ids.split(7, 1):
        model(part, cache=pieces)
    for name in ("cut.number", "cut.begin"):
        assert torch.equal(whole.layers[1].tensors[name], pieces.layers[1].tensors[name])


@torch.no_grad()
def test_stream_and_rows_that_begin_anew():
    model = model_of(max_cached_segments=2)
    ids, states = tokens(2, 50), []
    for piece in (50, 3):
        stream = Stream(model, rows=2, piece=piece)
        stream.feed(ids)
        states.append(torch.stack([layer.tensors["state.0"] for layer in stream.cache.layers]))
    assert_close(states[0], states[1], 1e-9)
    cache = MCCache(config=model.config)
    model(ids, cache=cache)
    cache.begin_rows(torch.tensor([True, False]), model)
    assert_close(model(ids, cache=cache).logits[0], model(ids, use_cache=False).logits[0], 1e-9)


def test_save_and_load(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path, with_code=False)
    loaded = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(loaded(tokens(1, 40)).logits, model(tokens(1, 40)).logits, 1e-12)


# --------------------------------------------------------------------------------------------------- what is refused
REFUSED = [
    ({"least_segment_size": 9}, "`least_segment_size`=9 .* 1 to segment_size=8"),
    ({"mean_segment_size": 9}, "`mean_segment_size`=9 .* from least_segment_size=2 to segment_size=8"),
    ({"border_budget": 0}, "`border_budget`=0 .* a number > 0"),
    ({"border_loss_weight": -1}, "`border_loss_weight`=-1 .* a number >= 0"),
    ({"aggregation": "none"}, "`segmentation`='content' .* 'constant' or 'logarithmic'"),
    ({"cache_eviction": "least_read", "max_cached_segments": 2}, "`cache_eviction`='least_read' .* 'oldest'"),
    ({"segmentation": "constant"}, "`border_rule`='budget' .* 'dissimilarity' unless segmentation='content'"),
]


@pytest.mark.parametrize("fields, message", REFUSED, ids=lambda x: name_of(x) if isinstance(x, dict) else "")
def test_fields_that_mean_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        MCConfig(**{"segment_size": 8, **CONTENT, **RULES["budget"], **fields})


def test_what_cannot_be_is_refused_by_name(model):
    ids, content = tokens(1, 20), "`segmentation`='content'.*allowed: .*'constant'"
    with pytest.raises(ValueError, match=content):
        check_shards(model.config, 32)
    with pytest.raises(ValueError, match=content):
        MemoryCaching(24, 2, segmentation="content")
    with pytest.raises(ValueError, match=content):
        read_gates(model, ids)
    with pytest.raises(ValueError, match=content):
        model(ids, cache=MCCache(config=model.config, keep_borders=True))
    with pytest.raises(ValueError, match=content):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=3)
    cache = MCCache(config=model.config)
    model(ids, cache=cache)
    for go_back in (lambda: cache.at_segment(1), lambda: cache.rewind(9)):
        with pytest.raises(ValueError, match=content):
            go_back()
    with pytest.raises(ValueError, match="segmentation='constant'"):
        MCCache.cat([cache], model)
    store = PrefixStore(model, max_bytes=10**7)
    assert store.read(ids) is None and store.stats()["unsupported"] == 1
