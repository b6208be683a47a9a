"""`wrap_rnn`: LSTMs and GRUs of torch with a cached read, against torch's own and against the equations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from helpers import assert_close
from mc_transformers import CachedRNN, MCCache, MemoryCaching, make_cache, wrap_rnn


SEGMENT, INPUTS, WIDTH = 7, 5, 8
KINDS = [(nn.LSTM, 1), (nn.LSTM, 3), (nn.GRU, 2)]
RULES = [
    {"aggregation": "grm", "heads": 2},
    {"aggregation": "ssc", "num_selected_segments": 2},
    {"aggregation": "residual", "heads": 4},
    {"aggregation": "mean"},
    {"aggregation": "none"},
]
EVERY = pytest.mark.parametrize("kind, layers", KINDS, ids=lambda x: getattr(x, "__name__", x))


def wrapped_rnn(kind: type, layers: int, rnn_fields: dict | None = None, **fields) -> CachedRNN:
    """In float64, with reads that matter."""
    torch.manual_seed(0)
    rnn = kind(INPUTS, WIDTH, layers, **{"batch_first": True} | (rnn_fields or {})).double()
    wrapped = wrap_rnn(rnn, **{"segment_size": SEGMENT} | fields)
    wrapped.plain = [rnn]  # in a list, so that it is no part of the module
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "cell" not in name:
                parameter.normal_()
    return wrapped


def flat(state) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def naive(wrapped: CachedRNN, x: torch.Tensor) -> torch.Tensor:
    """The equations of `wrap_rnn`, token after token, from what the RNN itself answers."""
    config, memory = wrapped.config, wrapped.mixer.memory
    parts = x.split(SEGMENT, 1) if config.state_init == "independent" else [x]
    h = torch.cat([wrapped.plain[0](part)[0] for part in parts], 1).unflatten(-1, (memory.num_heads, -1))
    out, ends = [], []
    for t in range(x.shape[1]):
        if t and t % SEGMENT == 0:
            ends.append(t - 1)
        past = ends
        if config.aggregation == "none":
            past = []
        scale = wrapped.mixer.cached_scale.bias[:, None] if hasattr(wrapped.mixer, "cached_scale") else 1.0
        rows = []
        for row in range(len(x)):
            if config.aggregation == "ssc":  # whose inputs are most like this one on average
                score = [(x[row, t] @ x[row, end + 1 - SEGMENT : end + 1].mean(0)).item() for end in ends]
                past = sorted(ends, key=lambda end: -score[ends.index(end)])[: config.num_selected_segments]
            total = h[row, t]
            for end in past:
                gate = 1.0
                if memory.own_gates:
                    of_online, of_cached = memory.read_gate.weight.chunk(2, -1)
                    raw = torch.einsum("hd,hed->he", h[row, t], of_online) + memory.read_gate.bias
                    gate = (raw + torch.einsum("hd,hed->he", h[row, end], of_cached)).sigmoid()
                total = total + scale * gate * h[row, end]
            rows.append(total / (1 + len(past)) if config.aggregation == "mean" else total)
        out.append(torch.stack(rows).flatten(1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("state_init", ["checkpoint", "independent"])
@pytest.mark.parametrize("fields", RULES, ids=lambda fields: fields["aggregation"])
@EVERY
def test_it_is_the_equations(kind, layers, fields, state_init) -> None:
    """Values and all gradients; whole, in pieces, token by token, padded, packed, and by the reference."""
    wrapped = wrapped_rnn(kind, layers, **fields, state_init=state_init)
    x = torch.randn(2, 24, INPUTS, dtype=torch.float64, requires_grad=True)
    if fields["aggregation"] == "none":
        state_init = wrapped.config.state_init = "checkpoint"  # the field has no meaning then
    expected, (out, state) = naive(wrapped, x), wrapped(x)
    assert_close(out, expected, 1e-10)
    leaves = [x, *wrapped.parameters()]
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, retain_graph=True)
    for name, mine, theirs in zip(
        ["x", *dict(wrapped.named_parameters())],
        grads,
        torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True),
        strict=True,
    ):
        assert theirs is None and (mine is None or not mine.any()) or mine is not None
        if theirs is not None:
            assert_close(mine, theirs, 1e-9, name)
    assert_close(out[:, :SEGMENT], wrapped.plain[0](x)[0][:, :SEGMENT], 1e-10, "first segment")
    if state_init == "checkpoint":
        for mine, theirs in zip(flat(state), flat(wrapped.plain[0](x)[1]), strict=True):
            assert_close(mine, theirs, 1e-10, "state")
    with torch.no_grad():
        for lengths in ([9, 1, 5, 9], [1] * 24):
            cache = make_cache(wrapped)
            pieces = [wrapped(piece, cache=cache) for piece in x.split(lengths, 1)]
            assert_close(torch.cat([piece[0] for piece in pieces], 1), out, 1e-10, str(lengths[:3]))
            for mine, theirs in zip(flat(pieces[-1][1]), flat(state), strict=True):
                assert_close(mine, theirs, 1e-10, "state after pieces")
        mask = torch.ones(2, 30)
        mask[0, :6], mask[1, [0, 3, 9, 10, 20, 29]] = 0, 0
        padded = torch.full((2, 30, INPUTS), torch.nan, dtype=torch.float64).masked_scatter(mask[..., None] > 0, x)
        again, last = wrapped(padded, attention_mask=mask)
        assert_close(again[mask > 0].view_as(out), out, 1e-10, "padded")
        for mine, theirs in zip(flat(last), flat(state), strict=True):
            assert_close(mine, theirs, 1e-10, "state behind padding")
        packed, last = wrapped(x.reshape(1, 48, INPUTS), cu_seq_lens=torch.tensor([0, 24, 48]))
        assert_close(packed.view_as(out), out, 1e-10, "packed")
        assert last is None
        wrapped.config.mc_backend = "reference"
        assert_close(wrapped(x)[0], out, 1e-10, "reference")


@EVERY
def test_it_takes_the_place_of_the_rnn(kind, layers) -> None:
    """Until its read is trained, and without caching always: layouts, states, biases, dropout, dtypes, gradients."""
    for batch_first, bias in ((False, True), (True, False)):
        for fields in ({}, {"aggregation": "ssc"}, {"aggregation": "none"}):
            rnn = kind(INPUTS, WIDTH, layers, batch_first=batch_first, bias=bias)
            wrapped, x = wrap_rnn(rnn, segment_size=SEGMENT, **fields), torch.randn(20, 17, INPUTS)
            assert set(rnn.parameters()) <= set(wrapped.parameters())
            rows = 20 if batch_first else 17
            hx = [torch.randn(layers, rows, WIDTH) for _ in range(2 if kind is nn.LSTM else 1)]
            hx = tuple(hx) if kind is nn.LSTM else hx[0]
            grads = []
            for module in (rnn, wrapped):
                out, state = module(x, hx)
                more, state = module(x.flip(0), state)
                (more.square().sum() + out.sum()).backward()
                grads.append([p.grad.clone() for p in rnn.parameters()])
                rnn.zero_grad()
                grads[-1] += [out, more, *flat(state)]
            for mine, theirs in zip(grads[1], grads[0], strict=True):
                assert_close(mine, theirs, 1e-5 if mine.requires_grad else 1e-4)
                assert mine.shape == theirs.shape
            half = copy.deepcopy(wrapped).bfloat16()
            assert half(x.bfloat16())[0].dtype == torch.bfloat16
            assert_close(half(x.bfloat16())[0].float(), wrapped(x)[0], 0.05)
    if layers > 1:
        wrapped = wrapped_rnn(kind, layers, {"dropout": 0.5})
        x = torch.randn(2, 20, INPUTS, dtype=torch.float64)
        assert not torch.equal(wrapped(x)[0], wrapped(x)[0])
        assert torch.equal(wrapped.eval()(x)[0], wrapped(x)[0])


def test_it_learns_to_read_and_is_saved() -> None:
    """A frozen RNN that was there before: what the read adds must bring back an input that the RNN has forgotten."""
    torch.manual_seed(0)
    rnn = nn.GRU(INPUTS, WIDTH, batch_first=True)
    wrapped, head = wrap_rnn(rnn.requires_grad_(False), segment_size=4), nn.Linear(WIDTH, 1)
    x = torch.randn(64, 32, INPUTS)
    optimizer = torch.optim.Adam([p for p in [*wrapped.parameters(), *head.parameters()] if p.requires_grad], lr=0.02)
    losses = {}
    for name, read in (("plain", lambda: rnn(x)[0][:, -1]), ("cached", lambda: wrapped(x)[0][:, -1])):
        for _ in range(150):
            optimizer.zero_grad()
            loss = (head(read())[:, 0] - x[:, 3, 0]).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["cached"] < 0.6 * losses["plain"]
    assert wrapped.mixer.cached_scale.bias.abs().min() > 0.01
    twin = wrap_rnn(nn.GRU(INPUTS, WIDTH, batch_first=True), segment_size=4)
    twin.load_state_dict(wrapped.state_dict())
    assert torch.equal(twin(x)[0], wrapped(x)[0])
    plain = nn.GRU(INPUTS, WIDTH, batch_first=True)
    plain.load_state_dict(twin.cells.state_dict())
    assert torch.equal(plain(x)[0], rnn(x)[0])


@torch.no_grad()
def test_caches_of_wrapped_rnns() -> None:
    """Logarithmic, bounded, with an online memory of its own, begun with a state; beside a layer of this family; one
    that is rolled back; and compiled."""
    x, h = torch.randn(2, 30, INPUTS, dtype=torch.float64), torch.randn(2, 2, WIDTH, dtype=torch.float64)
    for fields in (
        {"segmentation": "logarithmic"},
        {"max_cached_segments": 2},
        {"max_cached_segments": 2, "cache_eviction": "least_read", "aggregation": "ssc"},
        {"state_init": "independent", "online_memory": "running"},
    ):
        wrapped = wrapped_rnn(nn.GRU, 2, **fields)
        out, state = wrapped(x, h)
        cache = make_cache(wrapped)
        pieces = [
            wrapped(x[:, :11], h, cache=cache)[0],
            *(wrapped(x[:, t : t + 1], cache=cache)[0] for t in range(11, 30)),
        ]
        assert_close(torch.cat(pieces, 1), out, 1e-10, str(fields))
        if "online_memory" in fields:
            assert_close(state, wrapped.plain[0](x, h)[1], 1e-10)
    model = nn.ModuleList([wrapped_rnn(nn.LSTM, 2), MemoryCaching(WIDTH, 2, segment_size=4, layer_idx=1).double()])

    def both(x: torch.Tensor, cache: MCCache | None = None) -> torch.Tensor:
        return model[1](model[0](x, cache=cache)[0], cache=cache)

    cache = make_cache(model)
    both(x[:, :10], cache)
    cache.activate_past_recording()
    both(-x[:, :9], cache)
    cache.crop(-9)
    assert_close(both(x[:, 10:], cache), both(x)[:, 10:], 1e-10)
    torch._dynamo.reset()
    wrapped = wrapped_rnn(nn.LSTM, 2)
    assert_close(torch.compile(wrapped, fullgraph=True, backend="aot_eager")(x)[0], wrapped(x)[0], 1e-10)


def test_what_cannot_be_wrapped() -> None:
    for rnn, message in (
        (nn.Linear(2, 2), "must be a torch.nn.LSTM or torch.nn.GRU, got Linear"),
        (nn.RNN(2, 2), "got RNN"),
        (nn.GRU(2, 2, bidirectional=True), "bidirectional"),
        (nn.LSTM(2, 4, proj_size=2), "proj_size=2"),
    ):
        with pytest.raises(ValueError, match=f"wrap_rnn: `rnn`.*{message}"):
            wrap_rnn(rnn)
    lstm = nn.LSTM(INPUTS, WIDTH, batch_first=True)
    for fields, message in (
        ({"aggregation": "soup"}, "`aggregation`='soup'.*'grm'"),
        ({"heads": 3}, "multiple of num_attention_heads=3"),
        ({"memory": "gru"}, "`memory` is not a field"),
        ({"state_inti": "independent"}, "is `state_init` meant"),
    ):
        with pytest.raises(ValueError, match=message):
            wrap_rnn(lstm, **fields)
    wrapped, x, h = wrap_rnn(lstm), torch.randn(2, 6, INPUTS), torch.zeros(1, 2, WIDTH)
    cache = make_cache(wrapped)
    wrapped(x, cache=cache)
    for inputs, message in (
        ({"x": x[..., 1:]}, "`x` must be floats of shape .rows, tokens, 5"),
        ({"x": pack_sequence([x[0]])}, "PackedSequence"),
        ({"hx": h}, r"`hx` must be .h, c. of shape .1, 2, 8.*got \[.1, 2, 8.\]"),
        ({"hx": (h, h[:, :1])}, "`hx` must be"),
        ({"hx": (h, h), "cache": cache}, "`hx` is given and `cache` has read something"),
        ({"x": x[:1], "hx": (h, h), "cu_seq_lens": torch.tensor([0, 6])}, "`hx` has no meaning with `cu_seq_lens`"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapped(**{"x": x} | inputs)
    other = MemoryCaching(INPUTS, 1)
    cache = make_cache(other)
    other(x, cache=cache)
    with pytest.raises(ValueError, match="filled by another model"):
        wrapped(x, cache=cache)
