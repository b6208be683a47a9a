"""What a GPU would refuse or wait for, shown without one."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from helpers import build, randn, small_config, tokens, with_triton
from mc_transformers.kernels.read.segment import segment_read
from mc_transformers.kernels.shared.ops import running_sum
from mc_transformers.kernels.write.linear import linear_write
from op_inputs import leaves, read_inputs, to_dtype


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tf32_that_was_set_by_the_newer_names(dtype, monkeypatch):
    """`TrainingArguments(tf32=True)` does that; the older getter raises from then on."""
    from mc_transformers.kernels.shared.triton import dot_precision

    q = randn(1, 1, 5, 1, 4).to(dtype)
    assert dot_precision(q) == "tf32x3"
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    assert dot_precision(q) == ("tf32" if dtype == torch.float32 else "tf32x3")
    linear_write(q, q, q, backend="triton")


class NoFloatSums(TorchDispatchMode):
    """Refuses what CUDA refuses in deterministic mode."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.cumsum and args[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory, aggregation", [("gated_linear", "ssc"), ("rwkv7", "grm"), ("titans", "soup")])
def test_training_in_deterministic_mode(memory, aggregation):
    """conftest.py has turned it on."""
    model = build(small_config(memory, aggregation=aggregation))
    with NoFloatSums():
        model(tokens(2, 21), labels=tokens(2, 21)).loss.backward()


def test_the_sum_of_deterministic_mode():
    for dim, x in ((1, randn(3, 13, 2)), (-1, randn(2, 1)), (0, randn(64, 2))):
        torch.testing.assert_close(running_sum(x, dim), x.cumsum(dim), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", [None, 2])
def test_a_graph_that_is_captured_by_hand(bound, monkeypatch):
    """Nothing is read back to the host: a fake tensor has no values."""
    model = build(small_config("gated_linear", aggregation="ssc", max_cached_segments=bound))
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(tokens(1, 9), cache=cache)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(mode.from_tensor(tokens(1, 1)), cache=cache)


@with_triton
def test_chips_are_told_apart_by_shared_memory(monkeypatch):
    """L4 and RTX have 99 KiB, whatever their number says; and before sm_80 there is nothing."""
    from mc_transformers.kernels.shared.ops import _no_triton
    from mc_transformers.kernels.shared.triton import _chip

    found = {}
    for major, minor, kib in ((7, 5, 64), (8, 0, 163), (8, 9, 99), (9, 0, 227), (10, 0, 227), (12, 0, 99)):
        gpu = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=1024 * kib)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        x = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float32)
        found[major, minor] = _no_triton(x, (64,), 256) or _chip.__wrapped__(x.device)
    assert found.pop((7, 5)) == "the GPU has compute capability 7.5, allowed: 8.0 and later"
    assert list(found.values()) == ["ampere", "small", "hopper", "blackwell", "small"]


@with_triton
def test_documents_do_not_walk_through_each_other():
    """NaN in all tokens of one document: what another one's memories get is made without a look at them."""
    q, u, states, summaries, logit, birth, _ = to_dtype(read_inputs(1, 4, 0, 32, 1), torch.float32)
    first = torch.tensor([[0, 0, 2, 2]])
    q[:, 2:], u[:, 2:] = torch.nan, torch.nan
    inputs = leaves([q, u, states, summaries, logit])
    out, _ = segment_read(*inputs, birth, first, backend="triton")
    out.sum().backward()
    assert inputs[2].grad[:, :2].isfinite().all() and inputs[2].grad[:, 0].any()


@with_triton
def test_slots_of_a_static_cache_behind_the_last_one():
    """They are not multiplied by a gate of 0: they may hold NaN."""
    q, u, states, summaries, logit, birth, first = to_dtype(read_inputs(2, 2, 5), torch.float32)
    birth[:, 2:5] = 2**30
    inputs = (q, u, states, summaries, logit, birth, first)
    expected = segment_read(*inputs, backend="triton")
    for x in (states, summaries):
        x[:, 2:5] = torch.nan
    assert all(map(torch.equal, segment_read(*inputs, backend="triton"), expected))


class NoGatheredSummaries(TorchDispatchMode):
    """Refuses `[R, N, W, H, k, m, d]`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not (torch.is_tensor(out) and out.dim() == 7), function
        return out


def test_no_summary_is_fetched_per_token():
    model = build(small_config("linear", aggregation="ssc", summaries_per_segment=2))
    with NoGatheredSummaries():
        model(tokens(2, 40), labels=tokens(2, 40)).loss.backward()
