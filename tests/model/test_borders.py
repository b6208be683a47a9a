"""Every question that `Borders` answers, against a walk over the tokens."""

import pytest
import torch
from torch.nn import functional as F

from helpers import assert_close, build, name_of, small_config
from mc_transformers.modeling_mc.borders import Borders
from mc_transformers.modeling_mc.segments import SegmentTable
from mc_transformers.modeling_mc.summary import Summary


@pytest.mark.parametrize("size", [1, 3, 8])
def test_answers_equal_a_walk(size: int) -> None:
    borders, segment, inside = Borders(size), 0, 0
    for position in range(30):
        assert (borders.finished(position), borders.offset(position)) == (segment, inside)
        assert borders.start(segment) + inside == position
        assert borders.most_finished(position) == segment
        last = inside + 1 == borders.count(segment)
        assert borders.full(position) == last
        segment, inside = (segment + 1, 0) if last else (segment, inside + 1)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_bounds_are_reached(size: int) -> None:
    """As small as possible: a grid has no segment too many, and a row may begin anywhere in its first one."""
    borders = Borders(size)
    for length in range(1, 20):
        stand_in = [borders.finished(start + length - 1) - borders.finished(start) + 1 for start in range(size)]
        assert borders.most_begun(length) == stand_in[0]
        assert borders.most_begun(length, anywhere=True) == max(stand_in)


def test_levels_answer_at_once() -> None:
    position = torch.arange(40)[:, None]
    every, each = Borders(3).levels(4, position.device), [Borders(3).coarser(1 << level) for level in range(4)]
    for name in ("finished", "offset", "full", "count"):
        expected = torch.cat([torch.as_tensor(getattr(one, name)(position)).expand(40, 1) for one in each], 1)
        assert torch.equal(getattr(every, name)(position).expand(40, 4), expected), name
    assert Borders(3).levels(1, position.device) == Borders(3)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_descriptors_are_means_of_the_tokens_that_are_there(num_blocks: int) -> None:
    """Whole segments, shorter ones, and all levels of logarithmic segmentation; a sub-block without a token repeats
    the first, which changes no largest product."""
    borders, source = Borders(6), torch.randn(24, 2, 5, dtype=torch.float64)

    def naive(size: int, count: int) -> torch.Tensor:
        block = size // num_blocks
        parts = [source[i * block : min((i + 1) * block, count)] for i in range(num_blocks)]
        return torch.stack([(part if len(part) else parts[0]).mean(0) for part in parts], 1)

    def sums(size: int, count: int) -> torch.Tensor:
        block = size // num_blocks
        return torch.stack([source[i * block : min((i + 1) * block, count)].sum(0) for i in range(num_blocks)], 1)

    summary = Summary(borders, num_blocks)
    torch.testing.assert_close(summary.mean(sums(6, 6), borders.count(0)), naive(6, 6))
    lengths = torch.arange(1, 7)
    found = summary.mean(torch.stack([sums(6, n) for n in lengths.tolist()]), lengths)
    torch.testing.assert_close(found, torch.stack([naive(6, n) for n in lengths.tolist()]))
    every = borders.levels(3, source.device)
    found = Summary(every, num_blocks).mean(torch.stack([sums(n, n) for n in (6, 12, 24)]), every.count(0))
    torch.testing.assert_close(found, torch.stack([naive(n, n) for n in (6, 12, 24)]))


class Given(Borders):
    """Borders that each row has for itself: `ends` `[R, n]`, positions behind the last token of every segment."""

    def __init__(self, ends: torch.Tensor, shortest: int, longest: int) -> None:
        for name, value in (("size", longest), ("ends", ends), ("shortest", shortest)):
            object.__setattr__(self, name, value)

    def finished(self, position):
        rows = position.reshape(len(self.ends), -1)
        return torch.searchsorted(self.ends, rows, right=True).view_as(position)

    def offset(self, position):
        return position - self.start(self.finished(position))

    def full(self, position):
        return self.start(self.finished(position) + 1) == position + 1

    def start(self, segment):
        starts = F.pad(self.ends, (1, 0))
        return starts.gather(1, segment.reshape(len(starts), -1)).view_as(segment)

    def count(self, segment):
        return self.start(segment + 1) - self.start(segment)

    def most_finished(self, num_tokens):
        return num_tokens // self.shortest

    def most_begun(self, num_tokens, anywhere=False):
        return Borders(self.shortest).most_begun(num_tokens, anywhere)


PLUGGED = [
    {"aggregation": "grm", "summaries_per_segment": 2},
    {"memory": "gated_delta", "aggregation": "ssc", "max_cached_segments": 3},
    {"memory": "swla", "aggregation": "grm", "max_cached_segments": 3, "cache_eviction": "least_read"},
    {"memory": "lstm", "aggregation": "mean", "state_init": "checkpoint"},
]


@pytest.mark.parametrize("fields", PLUGGED, ids=name_of)
@torch.no_grad()
def test_nobody_else_knows_where_segments_end(fields: dict) -> None:
    """With another object in its place, whose segments have 3 to 8 tokens and differ between the rows, a whole grid
    answers as token by token."""
    mixer = build(small_config(**fields), dtype=torch.float64).model.layers[0].mixer
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    borders = mixer.history.borders = Given(torch.randint(3, 9, (2, 20)).cumsum(1), 3, 8)
    table = SegmentTable.build(2, 37, 8, x.device, position=torch.zeros(2, dtype=torch.int64)).cut(borders)
    parts = mixer._project(x, table, None)
    assert_close(mixer._grid(parts, table, None), mixer._reference(parts, table, None), 1e-12)
