"""`slot_write`: some rows of a batch of states get other values."""

import pytest
import torch

from helpers import randn, with_triton
from mc_transformers.kernels.step.slot import slot_write, slot_write_op
from op_inputs import DTYPES


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


SOURCES = {
    "dense": lambda rows, levels, shape: randn(rows, levels, *shape).float(),
    "same-for-all": lambda rows, levels, shape: randn(1, 1, *shape).float(),
    "one-number": lambda rows, levels, shape: torch.tensor(0.5).expand(1, 1, *shape),
    "turned": lambda rows, levels, shape: randn(rows, levels, *shape[::-1]).float().transpose(2, -1),
}
PLACES = {"slots": (3, 1, 4), "levels": (2, 3, 3), "none": (2, 1, 3)}


def place_of(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and rows `[B, L]`; the slot of a row that is not written may be anything."""
    rows, levels, slots = PLACES[case]
    chosen = torch.arange(rows * levels).view(rows, levels) % 3 != 1
    slot = torch.rand(rows, slots).argsort(1)[:, :levels]
    return slot.where(chosen | (levels > 1), 99), chosen & (case != "none")


@with_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", PLACES)
def test_triton(case, source, dtype, monkeypatch):
    """Everything that is not written keeps its bits, whatever they are; nothing of other rows is read."""
    from mc_transformers.kernels.step import slot_triton

    monkeypatch.setattr(slot_triton, "BLOCK", 32)
    (rows, levels, slots), shape = PLACES[case], (2, 5, 7)
    slot, chosen = place_of(case)
    given = SOURCES[source](rows, levels, shape)
    target = torch.randint(-(2**15), 2**15, (rows, slots, *shape)).to(torch.int16)  # some of them NaN
    target = target.view(torch.int16).to(torch.int32).mul(65537).view(torch.float32).to(dtype)
    expected, kept = target.clone(), target.clone()
    for row, level in chosen.nonzero().tolist():
        expected[row, slot[row, level]] = given.expand(rows, levels, *shape)[row, level].to(dtype)
    same = slot_write(target, given, slot, chosen, False, "triton")
    assert torch.equal(bits(target), bits(kept)) and torch.equal(bits(same), bits(expected))
    if source == "dense":
        given[~chosen] = torch.nan
    assert slot_write(target, given, slot, chosen, True, "triton") is target
    assert torch.equal(bits(target), bits(expected))


@with_triton
@pytest.mark.parametrize("source", SOURCES)
def test_triton_level_by_level(source):
    """Without slots: every level in its own place."""
    target, chosen = randn(2, 3, 5, 7).float(), torch.tensor([[True, False, True], [False] * 3])
    given = SOURCES[source](2, 3, (5, 7))
    expected = slot_write(target, given, None, chosen, True, "torch")
    assert not torch.equal(target, expected)
    assert slot_write(target, given, None, chosen, True, "triton") is target and torch.equal(target, expected)


@with_triton
def test_triton_with_a_gradient():
    """The kernel has none and changes its input: torch runs."""
    slot, chosen = place_of("slots")
    target, source = randn(3, 4, 5).float(), randn(3, 1, 5).float().requires_grad_()
    before = target.clone()
    slot_write(target, source, slot, chosen, False, "triton").sum().backward()
    assert torch.equal(source.grad[:, 0, 0], chosen[:, 0].float()) and torch.equal(target, before)


@with_triton
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    slot, chosen = place_of("slots")
    slot = slot.clamp(max=3)
    torch.library.opcheck(slot_write_op, (randn(3, 4, 5).bfloat16(), randn(3, 1, 5).float(), slot, chosen, backend))
    square = (randn(3, 1, 5).float(), randn(3, 1, 5).float(), None, chosen, backend)
    torch.library.opcheck(slot_write_op, square)
