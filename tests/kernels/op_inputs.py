"""What the tests of several ops share: random inputs, and how two implementations are compared.

Every op has a file of its own. Its torch implementation is compared in float64 with a naive loop written from the
equations, its Triton kernels (in Triton's interpreter) with the torch implementation.
"""

from collections.abc import Callable, Sequence

import torch

from helpers import assert_close, randn, relative_error


SINGLE, HALF, BFLOAT = DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def is_float(x: object) -> bool:
    return torch.is_tensor(x) and x.is_floating_point()


def to_dtype(inputs: Sequence, dtype: torch.dtype) -> list:
    """The same inputs with all float tensors in `dtype`."""
    return [x.to(dtype) if is_float(x) else x for x in inputs]


def leaves(inputs: Sequence, grad: bool = True) -> list:
    """Copies of the inputs; float tensors ask for a gradient."""
    return [x.detach().clone().requires_grad_(grad) if is_float(x) else x for x in inputs]


# ------------------------------------------------------------------------------------------------ writes of matrices
def write_inputs(rows=2, num=3, width=5, heads=2, key=3, value=4, decay=True, initial=True, starts=False, dtype=None):
    """q, k, v, log_decay, initial and starts of `linear_write`."""
    dtype = dtype or torch.float64
    shape = (rows, num, width, heads)
    return (
        randn(*shape, key, dtype=dtype),
        randn(*shape, key, dtype=dtype),
        randn(*shape, value, dtype=dtype),
        torch.nn.functional.logsigmoid(randn(*shape) + 2).to(dtype) if decay else None,
        randn(rows, heads, key, value, dtype=dtype) if initial else None,
        (torch.arange(num) % 2 == 1).expand(rows, -1).contiguous() if starts else None,
    )


WRITES = {
    "plain": {},
    "no-decay": {"decay": False},
    "zero-start": {"initial": False},
    "starts": {"starts": True},
    "nothing": {"decay": False, "initial": False},
    "odd": {"rows": 1, "num": 2, "width": 7, "heads": 3, "key": 5, "value": 1},
    "one-token": {"rows": 3, "num": 1, "width": 1},
    "sub-chunks": {"rows": 1, "num": 2, "width": 131, "heads": 1},
    "whole-sub-chunks": {"rows": 1, "num": 2, "width": 128, "heads": 1, "starts": True},
}


# ---------------------------------------------------------------------------------------------------- gated reads
def read_inputs(rows=2, num=3, cached=2, width=5, heads=2, key=3, value=4, summary=5, blocks=1, packed=False):
    """q, u, states, summaries, online_logit, birth and first of `segment_read`."""
    memories = cached + num
    # rows with different numbers of kept memories; new ones are born one segment later
    birth = torch.cat([torch.zeros(rows, cached), torch.arange(1, num + 1).expand(rows, -1)], 1).long()
    if cached:
        birth[0, 0] = 2**30
    first = torch.zeros(rows, num, dtype=torch.long)
    if packed:
        first[:, num // 2 :] = num // 2
    return (
        randn(rows, num, width, heads, key),
        randn(rows, num, width, heads, summary),
        randn(rows, memories, heads, key, value),
        randn(rows, memories, heads, blocks, summary),
        randn(rows, num, width, heads),
        birth,
        first,
    )


READS = {
    "plain": {},
    "nothing-kept": {"cached": 0},
    "sub-blocks": {"blocks": 3},
    "packed": {"num": 4, "cached": 0, "packed": True},
    "one-segment": {"num": 1, "cached": 0},
    "one-segment-sub-blocks": {"num": 1, "cached": 0, "blocks": 2},
    "one-token": {"num": 1, "width": 1, "cached": 4},
    "odd": {"rows": 1, "num": 5, "width": 3, "heads": 3, "key": 7, "value": 1, "summary": 2},
}
LARGE_READS = {  # for the kernels
    "many-memories": {"rows": 1, "num": 3, "cached": 37, "width": 5, "heads": 1},
    "long-segments": {"rows": 1, "num": 2, "cached": 1, "width": 70, "heads": 1, "key": 20, "value": 33},
    "vectors": {"rows": 1, "num": 3, "width": 5, "key": 1, "value": 9},
    "wide-keys": {"rows": 1, "num": 2, "cached": 1, "width": 5, "heads": 1, "key": 150, "value": 9, "summary": 40},
    "wide-values": {"rows": 1, "num": 2, "cached": 1, "width": 5, "heads": 1, "key": 9, "value": 150},
    "blocks-of-16": {"rows": 2, "num": 3, "cached": 1, "width": 5, "key": 96, "value": 48},
    "many-packed": {"rows": 1, "num": 36, "cached": 0, "width": 1, "heads": 1, "packed": True},
}


def visible_to(birth: torch.Tensor, first: torch.Tensor, r: int, n: int) -> list[int]:
    """The memories that segment n of row r may read."""
    return [i for i in range(birth.shape[1]) if birth[r, i] <= n and i >= first[r, n]]


def score(u: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The largest `<u, mean>` over the sub-blocks of a segment."""
    return (means @ u).max()


def naive_read(q, u, states, summaries, online_logit, birth, first, function):
    """eq. 9 and 10, one token after the other."""
    rows, num, width, heads, _ = q.shape
    answers, online = [], []
    for r, n, w, h in torch.cartesian_prod(*(torch.arange(x) for x in (rows, num, width, heads))).tolist():
        seen = visible_to(birth, first, r, n)
        logits = [score(u[r, n, w, h], summaries[r, i, h]) for i in seen] + [online_logit[r, n, w, h]]
        logits = torch.stack(logits)
        gates = logits.softmax(0) if function == "softmax" else logits.sigmoid()
        answer = torch.zeros(states.shape[-1], dtype=q.dtype)
        for gate, i in zip(gates, seen, strict=False):
            answer = answer + gate * (states[r, i, h].T @ q[r, n, w, h])
        answers.append(answer)
        online.append(gates[-1])
    return torch.stack(answers).view(*q.shape[:-1], -1), torch.stack(online).view(q.shape[:-1])


def choices(rows=2, num=3, width=5, heads=2, memories=5, top_k=2):
    """Weights and distinct memories per token and head, -1 for the ones that are missing, with weight 0."""
    index = torch.rand(rows, num, width, heads, memories).argsort(-1)[..., :top_k].contiguous()
    index[:, 0, :, :, -1] = -1
    index[:, 0, :2] = -1
    return randn(*index.shape) * (index >= 0), index


# ------------------------------------------------------------------------------------------------ one token per row
def token_inputs(
    rows=2,
    memories=6,
    heads=2,
    key=5,
    value=7,
    summary=4,
    blocks=1,
    top_k=0,
    function="softmax",
    given=False,
    stored=torch.float32,
):
    """Inputs of `decode_step` in which a row reads nothing and what cannot be read is NaN; and the same in float64."""
    q, u = randn(rows, heads, key).float(), randn(rows, heads, summary).to(DTYPES[memories % 3])
    online, logit = randn(rows, heads, key, value).float(), randn(rows, heads).float()
    states, scale = randn(rows, memories, heads, key, value), None
    visible = torch.rand(rows, memories) < 0.6
    visible[-1] = rows == 1
    if stored == torch.int8:
        scale = states.abs().amax(-1, keepdim=True).float() / 127
        states = states / scale
    states = states.round().to(stored) if stored == torch.int8 else states.to(stored)
    summaries = randn(rows, memories, heads, blocks, summary).float()
    index = torch.rand(rows, heads, memories).argsort(-1)[..., :top_k] if given else None
    rest = (visible, index, top_k, function)
    exact = [x if x is None else x.double() for x in (q, u, online, logit, states, scale, summaries)]
    if scale is None:
        exact[4] = exact[4] * visible[..., None, None, None]
        states[~visible] = torch.nan
    else:
        exact[4] = states
        scale[~visible] = torch.nan
        exact[5] = scale.double().nan_to_num()
    return [q, u, online, logit, states, scale, summaries, *rest], [*exact, *rest]


# ------------------------------------------------------------------------------------------------------ comparisons
def results(op: Callable, inputs: Sequence, cotangents: Sequence | None = None) -> list[torch.Tensor]:
    """Outputs, and gradients of all float inputs; the outputs' gradients are random unless they are given."""
    inputs = leaves(inputs)
    trained = [x for x in inputs if is_float(x)]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if cotangents is None:
        torch.manual_seed(3)
        cotangents = [randn(*x.shape) for x in outputs]
    total = sum((x * c.to(x.dtype)).sum() for x, c in zip(outputs, cotangents, strict=True))
    total = total + 0 * sum(x.sum() for x in trained)  # also where an input has no effect
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, trained)]


def check(op: Callable, naive: Callable, inputs: Sequence, tolerance: float = 1e-10) -> None:
    """Values and gradients of the torch implementation against the naive loop."""
    for number, (actual, expected) in enumerate(zip(results(op, inputs), results(naive, inputs), strict=True)):
        assert_close(actual, expected, tolerance, f"output or gradient {number}")


def check_low_precision(op: Callable, inputs: Sequence, dtype: torch.dtype) -> None:
    """fp32 within 1e-5 of float64; bf16 inputs are computed in fp32, so only the output's rounding is left."""
    low = to_dtype(inputs, dtype)
    actual, expected = op(*low), op(*to_dtype(low, torch.float64))
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert actual[0].dtype == dtype
    assert all(x.dtype == torch.float32 for x in actual[1:])  # states and gates
    for got, wanted in zip(actual, expected, strict=True):
        rounding = 0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
        assert relative_error(got.double(), wanted) < 1e-5 + rounding


def rms_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(error) / RMS(expected); the result must be finite, and zero where zero is expected."""
    assert actual.shape == expected.shape and actual.isfinite().all()
    size = expected.double().pow(2).mean().sqrt()
    error = (actual.double() - expected.double()).pow(2).mean().sqrt()
    return (error / size).item() if size > 1e-12 else error.item()


def compare(
    op: Callable,
    inputs: Sequence,
    half: tuple[int, ...],
    dtype: torch.dtype,
    rounded: Sequence = (),
    products: float = 0.0,
) -> None:
    """Triton on `inputs`, of which those at the places `half` have `dtype`, against torch on the same in float64.

    In a half precision the error may be twice that of torch, which computes everything in fp32 and rounds the result
    to its dtype. Gradients of the inputs at the places `rounded` are sums of products that a kernel rounds to `dtype`.
    products: an error that is allowed in any case, because products take TF32.
    """
    given = [x.to(dtype if place in half else torch.float32) if is_float(x) else x for place, x in enumerate(inputs)]
    exact = to_dtype(given, torch.float64)
    outputs = op(*exact, backend="torch")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # gradients that arrive have the dtype of the outputs
    cotangents = [randn(*outputs[0].shape).to(dtype).double(), *(randn(*x.shape) for x in outputs[1:])]
    names = [f"output {place}" for place in range(len(outputs))]
    names += [f"gradient {place}" for place, x in enumerate(inputs) if is_float(x)]
    expected, twin, actual = (
        results(lambda *x, backend=backend: op(*x, backend=backend), numbers, cotangents)
        for numbers, backend in ((exact, "torch"), (given, "torch"), (given, "triton"))
    )
    for name, e, t, a in zip(names, expected, twin, actual, strict=True):
        error, allowed = rms_ratio(a, e), 1e-5
        if dtype != torch.float32:
            eps = torch.finfo(dtype).eps
            allowed = 2 * rms_ratio(t, e) + (3e-5 if a.dtype == torch.float32 else eps / 16)
            if name in [f"gradient {place}" for place in rounded]:
                allowed = max(allowed, 2 / 3 * eps)
            allowed = max(allowed, products)
        assert a.dtype == t.dtype and error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"
