"""What was read: `output_attentions`, `read_gates` and `plot_gates` show the gates that the answers were made with."""

from dataclasses import replace

import pytest
import torch

from helpers import accepts, assert_close, build, make_wild, name_of, small_config, tokens
from mc_transformers import LayerGates, MCCache, MCConfig, MCForCausalLM, plot_gates, read_gates
from mc_transformers.modeling_mc.mixer import MCMixer


RULES = [
    {"aggregation": "grm"},
    {"aggregation": "grm", "gate_function": "sigmoid"},
    {"aggregation": "grm", "gate_function": "relu", "summaries_per_segment": 2},
    {"aggregation": "ssc"},
    {"aggregation": "soup"},
    {"aggregation": "residual"},
    {"aggregation": "mean"},
    {"aggregation": "none"},
    {"aggregation": "grm", "online_gate_bias": 1.5},
    {"aggregation": "ssc", "cached_answers": "added", "cached_answers_start": 0.7},
    {"aggregation": "residual", "cached_answers": "added", "cached_answers_start": 0.7},
]
MEMORIES = [
    {"memory": "gated_delta"},
    {"memory": "titans"},
    {"memory": "gru"},
    {"memory": "gru", "vector_read": "add"},
    {"memory": "gru", "vector_read": "add_weighted"},
]
EVERY = [memory | rule for memory in MEMORIES for rule in RULES if accepts(**memory | rule)]


@pytest.mark.parametrize("fields", EVERY, ids=name_of)
@torch.no_grad()
def test_answers_mixed_by_these_gates_are_the_answers(fields: dict) -> None:
    """One memory after the other, one token after the other, in float64."""
    torch.manual_seed(0)
    config = small_config(**fields)
    mixer, x, shown = make_wild(MCMixer(config, 0)).double().eval(), torch.randn(2, 29, 24, dtype=torch.float64), []
    if hasattr(mixer, "cached_scale"):
        mixer.cached_scale.bias.fill_(0.7)
    mixer.read_gates.register_forward_hook(lambda module, inputs, gates: shown.append(gates))
    table = replace(mixer.table(x), gates={})
    expected = mixer.answers(x, table, None)[1]
    (gates,), memory, parts = shown, mixer.memory, mixer._project(x, table, None)
    assert gates.shape == (2, 2, 29, 1 if config.aggregation == "none" else 29 // 8 + 1)
    state, kept = memory.initial_state(2, x.device, x.dtype), []
    for t in range(29):
        if t % 8 == 0 and t and config.aggregation != "none":
            kept.append(state[: memory.num_read])
            state = memory.initial_state(2, x.device, x.dtype)
        token = parts.at(t)
        state = memory.step(state, token.k, token.v, token.gates)
        online, now = state[: memory.num_read], gates[:, :, t]
        assert not now[..., len(kept) : -1].any()  # what has not been finished is not read
        if config.aggregation == "soup" and memory.num_maps > 1:
            weights = [*now[..., : len(kept)].unbind(-1), now[..., -1]]
            mixed = tuple(
                sum(w.view(*w.shape, *[1] * (s.dim() - 2)) * s for w, s in zip(weights, states, strict=True))
                for states in zip(*kept, online, strict=True)
            )
            out = memory.read(mixed, token.q)
        else:
            answer = memory.read(online, token.q)
            q = answer if memory.own_gates else token.q
            out = now[..., -1:] * answer
            for i, one in enumerate(kept):
                out = out + now[..., i, None] * memory.read_cached(one, q)
        assert_close(expected[:, t], out, 1e-10, f"token {t}")


LAYOUTS = [
    {"aggregation": "grm"},
    {"aggregation": "ssc", "route_sharing": "model", "num_hidden_layers": 2},
    {"segmentation": "logarithmic"},
    {"max_cached_segments": 2},
    {"max_cached_segments": 2, "cache_eviction": "least_read"},
    {"aggregation": "none"},
    {"online_memory": "running", "memory": "swla"},
]


@pytest.mark.parametrize("fields", LAYOUTS, ids=name_of)
@torch.no_grad()
def test_one_text_has_the_same_gates_however_it_is_read(fields: dict) -> None:
    """In pieces, token by token, with padding, packed, by the reference; columns that are missing are zero."""
    model, ids = build(small_config(**fields), dtype=torch.float64), tokens(2, 29)
    whole = model(ids, output_attentions=True).attentions
    assert len(whole) == model.config.num_hidden_layers
    columns = whole[0].shape[-1]

    def widened(gates: torch.Tensor) -> torch.Tensor:
        missing = gates.new_zeros(*gates.shape[:-1], columns - gates.shape[-1])
        return torch.cat([gates[..., :-1], missing, gates[..., -1:]], -1)

    for gates in whole:
        assert_close(gates.sum(-1), torch.ones_like(gates[..., 0]), 1e-10)
        if model.config.max_cached_segments:
            assert ((gates[..., :-1] > 0).sum(-1) <= 2).all() and (gates[:, :, -1, :-1] > 0).sum() == 8
    for lengths in ([10, 1, 18], [1] * 29):
        cache = MCCache(config=model.config)
        pieces = [model(p, cache=cache, output_attentions=True).attentions for p in ids.split(lengths, 1)]
        for layer, gates in enumerate(whole):
            assert_close(torch.cat([widened(p[layer]) for p in pieces], 2), gates, 1e-10, str(lengths[:3]))
    mask = torch.ones(2, 36, dtype=torch.long)
    mask[0, :7], mask[1, [0, 3, 9, 10, 11, 20, 35]] = 0, 0
    padded = torch.zeros(2, 36, dtype=torch.long).masked_scatter(mask > 0, ids)
    for layer, gates in enumerate(model(padded, attention_mask=mask, output_attentions=True).attentions):
        gates = gates.transpose(1, 2)
        assert not gates[mask == 0].any()
        gates = gates[mask > 0].view(2, 29, *gates.shape[2:]).transpose(1, 2)
        assert_close(torch.cat([gates[..., : columns - 1], gates[..., -1:]], -1), whole[layer], 1e-10, "padded")
    packed = {"input_ids": ids.view(1, -1), "cu_seq_lens_q": torch.tensor([0, 29, 58]), "use_cache": False}
    for backend in ("torch", "reference"):
        model.config.mc_backend = backend
        for layer, gates in enumerate(model(**packed, output_attentions=True).attentions):
            gates = gates[0].unflatten(1, (2, 29)).transpose(0, 1)
            assert not gates[..., columns - 1 : -1].any()
            narrow = torch.cat([gates[..., : columns - 1], gates[..., -1:]], -1)
            assert_close(narrow, whole[layer], 1e-10, f"packed, {backend}")
        assert_close(model(ids, output_attentions=True).attentions[0], whole[0], 1e-10, backend)


def test_generate_hybrids_checkpoints_and_compiled() -> None:
    fields = {"layer_types": ["memory_caching", "full_attention"], "num_hidden_layers": 2}
    model, ids = build(small_config(**fields)), tokens(2, 21)
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True)
    assert [tuple(x.shape) for x in out.attentions] == [(2, 2, 21, 3), (2, 2, 21, 21)]
    assert model(ids).attentions is None
    out = model.generate(ids, max_new_tokens=6, do_sample=False, output_attentions=True, return_dict_in_generate=True)
    assert [x[0].shape[-1] for x in out.attentions] == [3, 3, 3, 3, 4, 4]
    assert all(torch.allclose(x[0].sum(-1), torch.ones(1), atol=1e-5) for x in out.attentions)
    model = build(small_config())
    expected = model(ids, output_attentions=True).attentions[0]
    model.gradient_checkpointing_enable()
    out = model.train()(ids, output_attentions=True, labels=ids)
    out.loss.backward()
    assert_close(out.attentions[0], expected, 1e-6)
    assert len(out.attentions) == 1 and model.model.layers[0].mixer.u_proj.weight.grad is not None
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids, output_attentions=True, use_cache=False).attentions[0], expected, 1e-5)


def test_nothing_is_made_when_nobody_asks(monkeypatch) -> None:
    model, ids = build(small_config()), tokens(2, 21)

    def fail(*args, **kwargs):
        raise AssertionError("gates that nobody asked for")

    for name in ("_grid_gates", "_token_gates"):
        monkeypatch.setattr(MCMixer, name, fail)
    model.generate(ids, max_new_tokens=2)
    with pytest.raises(AssertionError, match="nobody asked"):
        model(ids, output_attentions=True)


def test_spans_and_picture(tmp_path) -> None:
    """Which tokens stand behind a column, with padding and with levels, and the picture of it."""
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, :5] = 0
    (found,) = read_gates(build(small_config()), ids, mask)
    assert isinstance(found, LayerGates) and found.layer == 0 and found.gates.shape == (2, 2, 21, 3)
    assert found.spans[0, 20].tolist() == [[0, 8], [8, 16], [16, 21]]
    assert found.spans[1, 20].tolist() == [[5, 13], [0, 0], [13, 21]]
    assert found.spans[1, 3].tolist() == [[0, 0]] * 3 and found.spans[0, 7].tolist() == [[0, 0], [0, 0], [0, 8]]
    image = found.by_token()
    assert_close(image[0, :, 20, 9], found.gates[0, :, 20, 1], 1e-6)
    assert not image[:, :, 9, 10:].any() and not image[1, :, 4].any()
    (levels,) = read_gates(build(small_config(segmentation="logarithmic")), tokens(1, 60))
    assert levels.spans[0, 59].tolist() == [[48, 56], [32, 48], [0, 32], [56, 60]]
    assert levels.spans[0, 41].tolist() == [[32, 40], [0, 0], [0, 32], [40, 42]]
    (plain,) = read_gates(build(small_config(aggregation="none")).model, ids)
    assert plain.spans[0, 20].tolist() == [[0, 21]]
    pytest.importorskip("matplotlib")
    plot_gates(found, head=1, row=1, tokens=[str(i) for i in range(21)]).savefig(tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 1000
    for wrong in ({"head": 2}, {"row": 2}, {"tokens": ["a"]}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            plot_gates(found, **wrong)
    attention = MCConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, layer_types=["full_attention"]
    )
    with pytest.raises(ValueError, match="no memory layers"):
        read_gates(MCForCausalLM(attention), ids)
