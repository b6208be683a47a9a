"""The layer alone, in models that know nothing of this family, and around recurrent nets of torch."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import MEMORY_NAMES, SMALL, accepts, assert_close, build, make_wild, name_of, small_config
from mc_transformers import MCCache, MCConfig, MemoryCaching, make_cache
from mc_transformers.modeling_mc.layer import NOT_OF_A_LAYER


SMALL_LAYER = {name: value for name, value in SMALL.items() if name not in NOT_OF_A_LAYER}
KINDS = [
    *({"memory": memory, "aggregation": rule} for memory in MEMORY_NAMES for rule in ("grm", "ssc")),
    {"aggregation": "none"},
    {"memory": "swla", "aggregation": "mean", "state_init": "checkpoint"},
    {"segmentation": "logarithmic"},
    {"max_cached_segments": 2, "cache_eviction": "least_read"},
    {"vector_read": "add", "memory": "gru"},
]


def layer_of(seed: int = 0, **fields) -> MemoryCaching:
    torch.manual_seed(seed)
    return make_wild(MemoryCaching(24, 2, **SMALL_LAYER | fields))


def pieces_of(layer, x: torch.Tensor, lengths: list[int], cache: MCCache | None = None) -> torch.Tensor:
    cache = make_cache(layer) if cache is None else cache
    return torch.cat([layer(piece, cache=cache) for piece in x.split(lengths, 1)], 1)


@pytest.mark.parametrize("fields", [kind for kind in KINDS if accepts(**kind)], ids=name_of)
def test_one_text_is_one_text(fields: dict) -> None:
    """Whole, in pieces, token by token, padded, packed, as the layer of a model: the same, and so are gradients."""
    layer, x = layer_of(**fields).double(), torch.randn(2, 29, 24, dtype=torch.float64, requires_grad=True)
    whole = layer(x)
    (grad,) = torch.autograd.grad(whole.square().sum(), x, retain_graph=True)
    for lengths in ([29], [13, 1, 15], [1] * 29):
        out = pieces_of(layer, x, lengths)
        assert_close(out, whole, 1e-6, str(lengths[:3]))
        assert_close(torch.autograd.grad(out.square().sum(), x)[0], grad, 1e-6, f"gradient, {lengths[:3]}")
    mask = torch.ones(2, 36)
    mask[0, :7], mask[1, [0, 3, 9, 10, 11, 20, 35]] = 0, 0
    padded = torch.full((2, 36, 24), torch.nan, dtype=torch.float64).masked_scatter(mask[..., None] > 0, x)
    out = layer(padded, attention_mask=mask)
    assert_close(out[mask > 0].view(2, 29, 24), whole, 1e-6, "padded")
    assert not out[mask == 0].any()
    cache = make_cache(layer)
    halves = [layer(padded[:, :20], mask[:, :20], cache=cache), layer(padded[:, 20:], mask, cache=cache)]
    assert_close(torch.cat(halves, 1), out, 1e-6, "padded, in pieces")
    packed = layer(x.reshape(1, 58, 24), cu_seq_lens=torch.tensor([0, 29, 58]))
    assert_close(packed.view(2, 29, 24), whole, 1e-6, "packed")
    mixer = build(small_config(**SMALL_LAYER | {"value_head_dim": None} | fields)).double().model.layers[0].mixer
    mixer.load_state_dict(layer.mixer.state_dict())
    assert torch.equal(mixer(x, mixer.table(x)), whole)


class TwoLayers(nn.Module):
    """Somebody's model: a convolution in the place of embeddings, two mixers of different kinds, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Conv1d(3, 24, 1)
        self.second = MemoryCaching(24, 4, memory="gru", segment_size=4, layer_idx=1)
        self.first = MemoryCaching(24, 2, memory="gated_linear", aggregation="ssc", segment_size=8, head_dim=8)
        self.head = nn.Linear(24, 2)

    def forward(self, series: torch.Tensor, **kwargs) -> torch.Tensor:
        x = self.inputs(series.mT).mT
        x = x + self.first(F.layer_norm(x, (24,)), **kwargs)
        return self.head(x + self.second(F.layer_norm(x, (24,)), **kwargs))


def test_layers_of_a_model_share_a_cache_and_learn(tmp_path) -> None:
    torch.manual_seed(0)
    model, series = TwoLayers(), torch.randn(4, 30, 3)
    whole = model(series)
    cache = make_cache(model, offload_segments=True)
    assert_close(pieces_of(model, series, [9, 1, 1, 19], cache), whole, 1e-5)
    assert cache.get_seq_length() == 30 and cache.num_segments == 7 and cache.nbytes > 0
    cache.batch_select_indices(torch.tensor([2, 2]))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded, more = torch.load(buffer, weights_only=False), torch.randn(2, 6, 3)
    expected = model(torch.cat([series[[2, 2]], more], 1))[:, 30:]
    assert_close(model(more, cache=loaded), expected, 1e-5, "selected rows, saved and loaded")
    cache.activate_past_recording()
    model(-more, cache=cache)
    cache.crop(-6)
    assert_close(model(more, cache=cache), expected, 1e-5, "rolled back")

    target = torch.stack([series.cumsum(1)[..., 0], series.roll(9, 1)[..., 1]], -1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(series), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    twin = TwoLayers()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(series), model(series)) and torch.equal(copy.deepcopy(model)(series), model(series))


def test_half_precision_and_start() -> None:
    """Weights start as a model's do; in half precision the layer runs, pieces too, close to what it was."""
    torch.manual_seed(0)
    layer, model = (
        MemoryCaching(256, 4, memory="titans"),
        build(
            MCConfig(vocab_size=8, hidden_size=256, num_attention_heads=4, num_hidden_layers=1, memory="titans"),
            wild=False,
        ),
    )
    for (name, mine), theirs in zip(
        layer.mixer.named_parameters(), model.model.layers[0].mixer.parameters(), strict=True
    ):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.25, atol=1e-6, msg=name)
        torch.testing.assert_close(mine.mean(), theirs.mean(), rtol=1e-2, atol=0.02, msg=name)
    layer, x = layer_of(memory="gated_delta"), torch.randn(2, 20, 24)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(layer).to(dtype)
        out = half(x.to(dtype))
        assert out.dtype == dtype
        assert_close(out.float(), layer(x), 0.05)
        assert_close(pieces_of(half, x.to(dtype), [7, 1, 12]).float(), out.float(), 0.02)


def test_compiled() -> None:
    layer, x = layer_of(), torch.randn(2, 20, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # what a graph can hold; inductor is slow
    whole = layer(x)
    assert_close(compiled(x), whole, 1e-5)
    with torch.no_grad():
        cache = make_cache(layer)
        layer(x[:, :11], cache=cache)
        assert_close(compiled(x[:, 11:], cache=cache), whole[:, 11:], 1e-5)


def test_arguments() -> None:
    signature = inspect.signature(MemoryCaching).parameters
    assert all(
        signature[name].default == getattr(MCConfig, name) for name in ("memory", "aggregation", "segment_size")
    )
    assert not NOT_OF_A_LAYER - set(MCConfig.__annotations__)
    layer, x = layer_of(), torch.randn(2, 5, 24)
    for fields, message in (
        ({"segmet_size": 4}, "`segmet_size`.*is `segment_size` meant"),
        ({"vocab_size": 4}, "`vocab_size` is not a field of a memory layer, allowed: aggregation, "),
        ({"layer_idx": -1}, "`layer_idx`=-1"),
        ({"memory": "nothing"}, "`memory`='nothing'"),
        ({"num_heads": 5}, "multiple of num_attention_heads=5"),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryCaching(**{"hidden_size": 24, "num_heads": 2} | fields)
    for wrong in (x[0], x[..., :3], x[:, :0], x.long()):
        with pytest.raises(ValueError, match="`x` must be floats of shape .rows, tokens, 24"):
            layer(wrong)
    cache, other = make_cache(layer), make_cache(layer_of(memory="gru"))
    layer(x, cache=cache)
    for kwargs, message in (
        ({"attention_mask": torch.ones(2, 4)}, r"`attention_mask` must have shape \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 4), "cache": cache}, r"\(2, 5\) or, with what was read, \(2, 10\)"),
        ({"cu_seq_lens": torch.tensor([0, 5])}, "batch of one row"),
        ({"cu_seq_lens": torch.tensor([0, 5]), "cache": cache}, "exclude each other"),
        ({"cache": MCCache()}, "0 layers.*make_cache"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, **kwargs)
    with pytest.raises(ValueError, match="batch of 2 rows"):
        layer(x[:1], cache=cache)
    layer_of(memory="gru")(x, cache=other)
    with pytest.raises(ValueError, match="filled by another model.*memory='gru'"):
        layer(x, cache=other)
    for model, found in ((nn.Linear(2, 2), r"\[\]"), (nn.ModuleList([layer_of(), layer_of()]), r"\[0, 0\]")):
        with pytest.raises(ValueError, match=f"`layer_idx` {found}"):
            make_cache(model)
    assert "memory='linear', aggregation='grm'" in repr(layer)
