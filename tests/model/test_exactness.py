"""The same tokens give the same logits however they arrive: in pieces, padded, with holes, packed, or in a batch."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from helpers import (
    GATE_NAMES,
    MEMORY_NAMES,
    SEGMENTATIONS,
    VOCAB,
    accepts,
    assert_close,
    build,
    family,
    name_of,
    small_config,
    tokens,
)
from mc_transformers import MCCache, MCModel
from mc_transformers.configuration_mc import CHOICES


SIZE = 4
SEGMENTS = {"segment_size": SIZE, "memory_chunk_size": 2}
# every memory once per way that its states are kept and read
KINDS = family(aggregation=["none", "grm", "ssc"])
HYBRIDS = {"full": ["memory_caching", "full_attention"], "sliding": ["sliding_attention", "memory_caching"]}


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def plain(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one row, in one pass, without cache or mask."""
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0]


def in_pieces(model, ids: torch.Tensor, borders: Sequence[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a batch that is fed through one cache, piece by piece."""
    cache, out = MCCache(config=model.config), []
    with torch.no_grad():
        for start, stop in zip([0, *borders], [*borders, ids.shape[1]], strict=True):
            covered = None if mask is None else mask[:, :stop]
            out.append(model(ids[:, start:stop], attention_mask=covered, cache=cache).logits)
    return torch.cat(out, 1)


def padded(rows: list[torch.Tensor], masks: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens laid out by masks; what is masked is an ordinary token, as a mistake with zeros would hide."""
    mask = torch.tensor(masks)
    ids = tokens(*mask.shape, seed=7)
    for row, (real, where) in enumerate(zip(rows, mask.bool(), strict=True)):
        ids[row, where] = real
    return ids, mask


def check_rows(model, rows: list[torch.Tensor], logits: torch.Tensor, mask: torch.Tensor) -> None:
    for row, real in enumerate(rows):
        assert_close(logits[row, mask[row].bool()], plain(model, real), TOLERANCE[logits.dtype], f"row {row}")


@pytest.fixture(scope="module", params=KINDS, ids=name_of)
def model(request):
    """Wild weights, in float64: a deep memory with such weights may amplify a rounding of fp32 by 10^3."""
    return build(small_config(**request.param, **SEGMENTS, num_hidden_layers=2), dtype=torch.float64)


@pytest.fixture(scope="module", params=KINDS, ids=name_of)
def single(request):
    """As initialised, in fp32."""
    return build(small_config(**request.param, **SEGMENTS, num_hidden_layers=2), wild=False)


@pytest.mark.parametrize("borders", [[SIZE], [1, 2, 3], [2, 3, 11, 12], [7, 9, 16]], ids=str)
def test_pieces(model, borders):
    ids = tokens(2, 19)
    logits = in_pieces(model, ids, borders)
    for row in range(2):
        assert_close(logits[row], plain(model, ids[row]), 1e-9)


@pytest.mark.parametrize("borders", [[3], [2, 9, 10], range(1, 19)], ids=str)
@pytest.mark.parametrize("segmentation", SEGMENTATIONS)
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_sub_blocks_in_pieces(blocks, segmentation, borders):
    """A new level of logarithmic segments starts with sub-blocks of another length than those of the level below."""
    segments = {"segment_size": 6 if blocks == 3 else 4, "memory_chunk_size": 2, "segmentation": segmentation}
    model = build(small_config(**segments, summaries_per_segment=blocks))
    ids = tokens(1, 19)
    assert_close(in_pieces(model, ids, borders)[0], plain(model, ids[0]), 1e-4)


LEFT_RIGHT_HOLES = [[0] * 5 + [1] * 14, [1] * 13 + [0] * 6, [1] * 3 + [0] * 5 + [1, 0] * 4 + [1] * 3, [1] * 19]


def test_padding_and_batch(model):
    """Left and right padding, holes, a full row: every row as alone."""
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(LEFT_RIGHT_HOLES)]
    ids, mask = padded(rows, LEFT_RIGHT_HOLES)
    with torch.no_grad():
        check_rows(model, rows, model(ids, attention_mask=mask, use_cache=False).logits, mask)
        check_rows(model, rows, model(ids, attention_mask=mask.bool(), use_cache=True).logits, mask)


@pytest.mark.parametrize("borders", [[4, 8, 9, 15], [12], range(1, 19)], ids=str)
def test_padding_in_pieces(model, borders):
    """Rows at different positions in their segments, some pieces all padding."""
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(LEFT_RIGHT_HOLES)]
    ids, mask = padded(rows, LEFT_RIGHT_HOLES)
    check_rows(model, rows, in_pieces(model, ids, borders, mask), mask)


LENGTHS = [5, SIZE, 1, 2 * SIZE + 1, 2, 3 * SIZE]


@pytest.mark.parametrize("borders_as", ["cu_seq_lens_q", "seq_idx"])
def test_packed_documents(model, borders_as):
    documents = [tokens(length, seed=length) for length in LENGTHS]
    features = [{"input_ids": document.tolist()} for document in documents]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        out = model(ids, labels=labels, **{borders_as: batch[borders_as]})
        alone = [model(document[None], labels=document[None]) for document in documents]
    for logits, other in zip(out.logits[0].split(LENGTHS), alone, strict=True):
        assert_close(logits, other.logits[0], 1e-9)
    total = sum(x.loss * (n - 1) for x, n in zip(alone, LENGTHS, strict=True) if n > 1)
    assert_close(out.loss, total / (sum(LENGTHS) - len(LENGTHS)), 1e-5)  # losses are fp32 in Transformers


def test_packed_batch_with_position_ids(model):
    """All that the collator returns at once, as the Trainer passes it."""
    documents = [tokens(length, seed=length) for length in LENGTHS]
    features = [{"input_ids": document.tolist()} for document in documents]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    with torch.no_grad():
        out = model(**batch)
    for logits, document in zip(out.logits[0].split(LENGTHS), documents, strict=True):
        assert_close(logits, plain(model, document), 1e-9)


def test_single_precision(single):
    """fp32 within 1e-4: pieces, padding and documents."""
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(LEFT_RIGHT_HOLES)]
    ids, mask = padded(rows, LEFT_RIGHT_HOLES)
    check_rows(single, rows, in_pieces(single, ids, [4, 5, 6, 11], mask), mask)
    with torch.no_grad():
        check_rows(single, rows, single(ids, attention_mask=mask, use_cache=False).logits, mask)
        borders = torch.tensor([0, 5, 9, 10, 19])
        packed = single(ids[3:], cu_seq_lens_q=borders).logits[0]
    for start, stop in zip(borders, borders[1:], strict=False):
        assert_close(packed[start:stop], plain(single, ids[3, start:stop]), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_mask_dtypes(dtype):
    model = build(small_config(**SEGMENTS))
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(LEFT_RIGHT_HOLES)]
    ids, mask = padded(rows, LEFT_RIGHT_HOLES)
    with torch.no_grad():
        check_rows(model, rows, model(ids, attention_mask=mask.to(dtype)).logits, mask)


def test_nan_at_padding_does_not_leak(model):
    """Values and gradients."""
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(LEFT_RIGHT_HOLES)]
    ids, mask = padded(rows, LEFT_RIGHT_HOLES)
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[mask == 0] = torch.nan
    embeds.requires_grad_()
    mixer = model.model.layers[0].mixer
    normed = model.model.layers[0].input_layernorm(embeds)
    out = mixer(normed, mixer.table(embeds, mask))
    assert out.isfinite().all() and (out[mask == 0] == 0).all()
    (gradient,) = torch.autograd.grad(out.square().sum(), embeds)
    assert gradient[mask == 1].isfinite().all()
    with torch.no_grad():
        check_rows(model, rows, model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits, mask)


# ---------------------------------------------------------------------------------------------------------- hybrids
@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request):
    layer_types = HYBRIDS[request.param]
    return build(
        small_config(**SEGMENTS, num_hidden_layers=2, layer_types=layer_types, sliding_window=5, num_key_value_heads=1)
    )


def test_hybrid_padding_and_batch(hybrid):
    masks = [x for x in LEFT_RIGHT_HOLES if x != LEFT_RIGHT_HOLES[2]]  # attention counts positions, holes and all
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(masks)]
    ids, mask = padded(rows, masks)
    with torch.no_grad():
        check_rows(hybrid, rows, hybrid(ids, attention_mask=mask, use_cache=False).logits, mask)
    check_rows(hybrid, rows, in_pieces(hybrid, ids, [4, 9, 10], mask), mask)


@pytest.mark.parametrize("borders", [[7, 9, 16], range(1, 19)], ids=str)
def test_hybrid_pieces(hybrid, borders):
    ids = tokens(1, 19)
    assert_close(in_pieces(hybrid, ids, borders)[0], plain(hybrid, ids[0]), 1e-4)


def test_hybrid_packed_documents(hybrid):
    documents = [tokens(length, seed=length) for length in LENGTHS]
    features = [{"input_ids": document.tolist()} for document in documents]
    batch = DataCollatorWithFlattening(return_seq_idx=True)(features)
    with torch.no_grad():
        out = hybrid(**batch, use_cache=False)
    for logits, document in zip(out.logits[0].split(LENGTHS), documents, strict=True):
        assert_close(logits, plain(hybrid, document), 1e-4)
    # the borders are enough, with and without a mask
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    for options in ({}, {"attention_mask": torch.ones_like(batch["input_ids"])}):
        with torch.no_grad():
            again = hybrid(**{"input_ids": batch["input_ids"], "cu_seq_lens_q": borders} | options, use_cache=False)
        assert_close(again.logits, out.logits, 1e-5)


# -------------------------------------------------------------------------------------------------------- causality
READS_ALL = {"num_selected_segments": 4}  # else a segment that "ssc" does not choose changes nothing, rightly


@pytest.mark.parametrize("fields", family(), ids=name_of)
def test_a_token_changes_nothing_before_it(fields):
    """And it does change what comes after, up to the last token."""
    model = build(small_config(**fields, **SEGMENTS | READS_ALL), dtype=torch.float64)
    ids = tokens(1, 4 * SIZE + 3)
    before = plain(model, ids[0])
    for time in (0, SIZE - 1, SIZE, 2 * SIZE + 2, 4 * SIZE + 1):
        changed = ids.clone()
        changed[0, time] = (changed[0, time] + 1) % VOCAB
        after = plain(model, changed[0])
        assert torch.equal(after[:time], before[:time])
        assert not torch.allclose(after[time], before[time], rtol=1e-3)
        assert not torch.equal(after[-1], before[-1])


@pytest.mark.parametrize("fields", family(aggregation=["grm", "ssc"]), ids=name_of)
def test_gradients_are_causal(fields):
    model = build(small_config(**fields, **SEGMENTS | READS_ALL), cls=MCModel)
    embeds = model.embed_tokens(tokens(1, 4 * SIZE)).detach().requires_grad_()
    time = 3 * SIZE + 1
    out = model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, time]
    (gradient,) = torch.autograd.grad(out.sum(), embeds)
    assert (gradient[0, time + 1 :] == 0).all()
    assert (gradient[0, : time + 1].abs().amax(-1) > 0).all()


# ---------------------------------------------------------------------------------------------- anything at random
DRAWN = set(CHOICES) - {"mc_backend", "segmentation"}
FIELDS = {field: st.sampled_from(CHOICES[field]) for field in CHOICES if field in DRAWN} | {
    "segmentation": st.sampled_from(SEGMENTATIONS),
    "memory": st.sampled_from(MEMORY_NAMES),
    "gate_function": st.sampled_from(GATE_NAMES),
    "summaries_per_segment": st.integers(1, 4),
    "num_selected_segments": st.integers(1, 4),
    "max_cached_segments": st.sampled_from([None, None, 1, 2, 3]),
    "conv_kernel_size": st.integers(0, 4),
    "num_attention_heads": st.sampled_from([1, 2, 3]),
    "num_hidden_layers": st.integers(1, 2),
    "memory_head_norm": st.booleans(),
    "allow_negative_eigenvalues": st.booleans(),
    "qk_norm": st.booleans(),
    "use_output_gate": st.booleans(),
}


@st.composite
def cases(draw):
    """A config, rows of any length padded anywhere, and a way to cut them into pieces."""
    chunk = draw(st.sampled_from([1, 2, 4]))
    fields = {"memory_chunk_size": chunk, "segment_size": chunk * draw(st.integers(1, 4))}
    for name, strategy in FIELDS.items():
        value = draw(strategy)
        if accepts(**fields | {name: value}):  # else the default stays
            fields[name] = value
    length = draw(st.integers(1, 26))
    masks = draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=3))
    borders = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    return fields, masks, sorted(borders)


@settings(max_examples=100)
@given(cases())
def test_anything(case):
    fields, masks, borders = case
    model = build(small_config(**fields), dtype=torch.float64)
    rows = [tokens(sum(mask), seed=row) for row, mask in enumerate(masks)]
    ids, mask = padded(rows, masks)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
    pieces = in_pieces(model, ids, borders, mask)
    assert whole.isfinite().all() and pieces.isfinite().all()
    for row, real in enumerate(rows):
        if len(real):
            expected = plain(model, real)
            assert_close(whole[row, mask[row].bool()], expected, 1e-9, "in one pass")
            assert_close(pieces[row, mask[row].bool()], expected, 1e-9, "in pieces")
