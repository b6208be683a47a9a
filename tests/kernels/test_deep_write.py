"""`deep_write`: the inner steps of memories that are small networks, and gradients through them."""

from functools import partial

import pytest
import torch

from helpers import randn, with_triton
from mc_transformers.kernels.write import deep as writes
from mc_transformers.kernels.write.deep import ANSWER, NOTHING, deep_write, deep_write_op
from op_inputs import compare, leaves, rms_ratio, to_dtype


def write_arguments(parts: int, norm: bool, resumed: bool, read: int, run: torch.Tensor) -> list:
    rows, chunks, size, heads, d, h = 2, 2, 2, 1, 3, 4
    tokens_of = (rows, chunks * size, heads)
    start = randn(rows, heads, d, h), randn(rows, heads, h, d)
    maps = [*start, *(randn(*x.shape) if resumed else None for x in start)]
    maps += [0.1 * randn(*x.shape) if parts > 1 else None for x in start]
    return [
        randn(*tokens_of, h if read == 1 else d),
        randn(*tokens_of, d),
        randn(*tokens_of, d),
        0.1 * randn(rows, chunks, heads, size, size).tril(),
        torch.rand(rows, chunks, heads, size, parts, dtype=torch.float64) if parts > 1 else None,
        torch.rand(rows, chunks, heads, size, parts, dtype=torch.float64) / 10,
        torch.rand(rows, chunks, heads, parts, parts, dtype=torch.float64).triu() if parts > 1 else None,
        *maps,
        *((randn(heads, d) + 1, randn(heads, d)) if norm else (None, None)),
        run,
        torch.tensor([1, 0])[: len(run)],
    ]


@pytest.mark.parametrize("read", [ANSWER, 0, 1, NOTHING])
@pytest.mark.parametrize("loss", ["dot", "l2"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize(
    ("parts", "resumed", "run"), [(1, False, [0, 0]), (2, False, [0, 0]), (2, True, [0, 0]), (2, True, [1])], ids=str
)
def test_gradcheck(monkeypatch, parts, resumed, run, norm, loss, read):
    monkeypatch.setattr(writes, "BUDGET", 1)
    op = partial(deep_write, loss=loss, read=read)
    inputs = leaves(write_arguments(parts, norm, resumed, read, torch.tensor(run)))
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


def test_opcheck():
    """Schema, fake tensors, autograd registration, and tracing with dynamic shapes."""
    inputs = write_arguments(2, True, True, ANSWER, torch.tensor([1]))
    torch.library.opcheck(deep_write_op, (*leaves(inputs), "l2", ANSWER))


# -------------------------------------------------------------------------------------------------------------- Triton
WRITES = {  # sizes and flags of `write_inputs`, loss, read
    "dla": ({"parts": 1, "gated": False}, "dot", ANSWER),
    "dla-decay": ({"parts": 1, "chunk": 4}, "dot", ANSWER),
    "titans": ({"chunks": 3}, "l2", ANSWER),
    "resumed": ({"heads": 2, "resumed": True, "run": [1]}, "l2", ANSWER),
    "one-chunk-of-one-token": ({"rows": 5, "chunks": 1, "chunk": 1, "resumed": True, "run": [0] * 5}, "l2", ANSWER),
    "long-chunk": ({"rows": 1, "chunk": 19, "run": [0]}, "l2", ANSWER),
    "wide": ({"rows": 1, "dim": 70, "hidden": 40, "run": [0]}, "l2", ANSWER),
    "first-map": ({"resumed": True}, "l2", 0),
    "second-map": ({"resumed": True}, "l2", 1),
    "first-map-ungated": ({"parts": 1, "gated": False}, "dot", 0),
    "no-answers": ({"resumed": True}, "l2", NOTHING),
}


def write_inputs(
    norm: bool,
    read: int,
    rows=2,
    chunks=2,
    chunk=5,
    heads=1,
    dim=9,
    hidden=19,
    parts=2,
    gated=True,
    resumed=False,
    run=(0, 0),
) -> list:
    """All of `deep_write` but loss and read: rows before the norm have everyday size, and a step moves maps a little,
    so that fp32 itself is exact enough to be compared with."""
    tokens, cells = (rows, chunks * chunk, heads), (rows, chunks, heads)
    maps = [randn(rows, heads, dim, hidden) / dim**0.5, randn(rows, heads, hidden, dim)]
    bases = [w + 0.1 * randn(*w.shape) if resumed else None for w in maps]
    momentum = [0.1 * randn(*w.shape) if resumed and parts > 1 else None for w in maps]
    enter, leave = 0.5 + 0.5 * torch.rand(*cells, chunk, parts), 0.03 * torch.rand(*cells, chunk, parts)
    return [
        randn(*tokens, hidden if read == 1 else dim),
        randn(*tokens, dim),
        randn(*tokens, dim),
        (0.03 * randn(*cells, chunk, chunk)).tril(),
        enter.double() if gated else None,
        leave.double(),
        torch.rand(*cells, parts, parts).double().triu() if gated else None,
        *maps,
        *bases,
        *momentum,
        *((0.3 * randn(heads, dim) + 1, randn(heads, dim)) if norm else (None, None)),
        torch.tensor(run),
        torch.tensor([chunks - 1, 0, 0, 0, 0][: len(run)]),
    ]


def write_of(case: str, **other_sizes):
    """The op of one case with its non-empty outputs, and how to draw inputs."""
    fields, loss, read = WRITES[case]

    def op(*inputs, backend):
        return tuple(x for x in deep_write(*inputs, loss=loss, read=read, backend=backend) if x.numel())

    return op, lambda norm: write_inputs(norm, read, **fields | other_sizes)


@with_triton
@pytest.mark.parametrize(
    ("case", "norm"), [*((case, True) for case in WRITES), ("dla", False), ("resumed", False), ("second-map", False)]
)
def test_triton(case, norm):
    """Answers, all ends and all gradients."""
    op, draw = write_of(case)
    compare(op, draw(norm), (0, 1, 2), torch.float32)


@with_triton
@pytest.mark.parametrize("case, dtype", [("titans", torch.bfloat16), ("second-map", torch.float16)], ids=str)
def test_triton_half(case, dtype):
    op, draw = write_of(case)
    compare(op, draw(True), (0, 1, 2), dtype, products=3e-2)


@with_triton
def test_triton_some_rows_at_a_time(monkeypatch):
    """The backward of one row after the other, of which only one leaves C and S."""
    from mc_transformers.kernels.write import deep_triton

    monkeypatch.setattr(deep_triton, "STACKS", 1)
    op, draw = write_of("resumed", heads=1)
    compare(op, draw(True), (0, 1, 2), torch.float32)


@with_triton
def test_triton_without_the_gradients_of_ends():
    """Those of ends that nothing used are not there."""
    _, loss, read = WRITES["resumed"]
    inputs = write_of("resumed", heads=1)[1](True)
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        given = leaves(to_dtype(inputs, dtype))
        answer = deep_write(*given, loss=loss, read=read, backend=backend)[0]
        trained = [x for x in given if x is not None and x.requires_grad]
        found.append(torch.autograd.grad(answer.square().sum(), trained))
    for expected, actual in zip(*found, strict=True):
        assert rms_ratio(actual, expected) < 1e-5


# without the ahead-of-time tracing: that is the same for both implementations
REGISTERED = ("test_schema", "test_autograd_registration", "test_faketensor")


@with_triton
def test_triton_is_registered():
    """Fake implementation and autograd, with the Triton implementation chosen."""
    inputs = write_inputs(True, ANSWER, rows=1, chunks=1, chunk=2, run=[0])
    torch.library.opcheck(
        deep_write_op, (*leaves(to_dtype(inputs, torch.float32)), "l2", ANSWER, "triton"), test_utils=REGISTERED
    )


@with_triton
def test_triton_refuses_what_no_kernel_can_do():
    wrong = ({"dim": 129}, "129 wide, allowed: up to 128"), ({"chunk": 65}, "`memory_chunk_size` is 65")
    for fields, reason in wrong:
        inputs = to_dtype(write_inputs(True, ANSWER, rows=1, chunks=1, run=[0], **fields), torch.float32)
        with pytest.raises(ValueError, match=reason):
            deep_write(*inputs, loss="l2", read=ANSWER, backend="triton")
        deep_write(*inputs, loss="l2", read=ANSWER)
