"""What a GPU would refuse or wait for, shown without one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from helpers import build, randn, small_config, tokens, with_triton
from mc_transformers.kernels.shared.ops import running_sum
from mc_transformers.kernels.write.linear import linear_write


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
