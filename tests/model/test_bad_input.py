"""Bad input gives an error that says what is wrong and what is allowed, or the right answer; never a wrong one."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from helpers import GATE_NAMES, MEMORY_NAMES, SMALL, VOCAB, assert_close, build, family, name_of, small_config, tokens
from mc_transformers import MCCache, MCConfig, MCForCausalLM, MCForSequenceClassification
from mc_transformers.configuration_mc import CHOICES, POSITIVE
from mc_transformers.modeling_mc.compat import CACHE_NAME


SIZE = SMALL["segment_size"]


@pytest.fixture(scope="module")
def model():
    return build(small_config())


# ------------------------------------------------------------------------------------------------------ config values
def refused(field: str, value, message: str = "", **others) -> str:
    """The error of a config, which names the field and the value."""
    with pytest.raises(ValueError) as error:
        MCConfig(**SMALL | others | {field: value})
    text = str(error.value)
    assert f"`{field}`" in text and repr(value) in text and "allowed" in text
    assert message in text
    return text


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_that_does_not_exist(field):
    text = refused(field, "nonsense")
    assert all(repr(value) in text for value in CHOICES[field])
    refused(field, 1)


def test_a_memory_that_does_not_exist():
    text = refused("memory", "nonsense")
    assert all(repr(name) in text for name in MEMORY_NAMES)
    refused("memory", 1)


def test_a_gate_function_that_does_not_exist():
    for value in ("nonsense", "one"):  # the second one is not a choice of a config
        assert all(repr(name) in refused("gate_function", value) for name in GATE_NAMES)
    refused("gate_function", 1)


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", [4]])
@pytest.mark.parametrize("field", POSITIVE)
def test_numbers_that_are_no_positive_integer(field, value):
    refused(field, value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
        ("conv_kernel_size", -1),
        ("conv_kernel_size", 1.5),
        ("initializer_range", -0.1),
        ("initializer_range", float("inf")),
        ("pad_token_id", VOCAB),
        ("rope_parameters", {"rope_type": "nonsense"}),
        ("rope_parameters", {"rope_theta": 0}),
        ("rope_parameters", {"rope_theta": None}),
        ("rope_parameters", {"memory_caching": {"rope_theta": 1e4}}),
        ("attention_dropout", 1.5),
        ("attention_dropout", -0.1),
        ("qk_norm", "yes"),
        ("use_output_gate", 2),
        ("hidden_act", "nonsense"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_other_values(field, value):
    refused(field, value)


@pytest.mark.parametrize(
    "field, value, others, allowed",
    [
        ("hidden_size", 25, {"head_dim": None}, "multiple of num_attention_heads=2"),
        ("layer_types", ["memory_caching"], {"num_hidden_layers": 2}, "num_hidden_layers=2"),
        ("layer_types", ["linear_attention"], {}, "memory_caching"),
        ("sliding_window", None, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ("head_dim", 7, {"layer_types": ["full_attention"]}, "an even width"),
        ("num_key_value_heads", 3, {"num_attention_heads": 4}, "divisor of num_attention_heads=4"),
        ("summaries_per_segment", 3, {}, f"divisor of segment_size={SIZE}"),
        ("memory_chunk_size", 3, {"memory": "dla"}, f"divisor of segment_size={SIZE}"),
        ("value_head_dim", 6, {"memory": "titans"}, "head_dim=8"),
        ("segment_summary", "hidden", {"hidden_size": 25}, "multiple of"),
        ("gate_source", "query", {"segment_summary": "hidden"}, "projection"),
        ("segment_summary", "position", {"head_dim": 9}, "odd width"),
        ("head_dim", 9, {"layer_types": ["full_attention"]}, "even width"),
        ("max_cached_segments", 3, {"segmentation": "logarithmic"}, "None"),
        ("vector_read", "add", {"memory": "linear"}, "multiply"),
        ("route_sharing", "model", {"aggregation": "grm"}, "ssc"),
        ("num_selected_segments", 0, {"aggregation": "ssc"}, ">= 1"),
    ],
)
def test_combinations_that_mean_nothing(field, value, others, allowed):
    refused(field, value, allowed, **others)


def test_heads_of_odd_width():
    """Only rotary positions need an even one."""
    for fields in ({}, {"rope": "none", "attention": "olmo_hybrid", "layer_types": ["full_attention"]}):
        assert build(small_config(head_dim=9, **fields))(tokens(1, 10)).logits.isfinite().all()


def test_a_misspelled_field_is_hinted_at(caplog):
    """Transformers lets every name through; what resembles none of ours is left alone."""
    MCConfig(**SMALL, agregation="none", some_attribute=1, sep_token_id=3)
    assert caplog.messages == ["MCConfig: `agregation` is not a field and has no effect; is `aggregation` meant?"]
    MCConfig(**MCConfig().to_dict())
    assert len(caplog.messages) == 1


def test_values_that_are_set_later(tmp_path):
    """`from_pretrained` sets fields on a config that was already checked."""
    build(small_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`aggregation`='grn' is not valid, allowed"):
        MCForCausalLM.from_pretrained(tmp_path, aggregation="grn")
    with pytest.raises(ValueError, match="`max_cached_segments`=4 is not valid, allowed: None with segm"):
        MCForCausalLM.from_pretrained(tmp_path, segmentation="logarithmic", max_cached_segments=4)
    build(small_config(layer_types=["full_attention"])).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="Missing required keys in `rope_parameters`.*factor"):
        MCForCausalLM.from_pretrained(tmp_path, rope_parameters={"rope_type": "linear"})


@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads", "layer_types", "rope_parameters"])
def test_fields_that_are_reset_later(field, tmp_path):
    """None means the default then as well."""
    model = build(small_config(head_dim=12, value_head_dim=12))
    model.save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path, **{field: None})
    assert getattr(loaded.config, field) == getattr(model.config, field)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_a_preset_that_does_not_exist():
    with pytest.raises(ValueError, match="`name`='mc-7b' is not known, allowed: .*mc-170m"):
        MCConfig.from_preset("mc-7b")


# ------------------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int16])
def test_token_dtypes(model, dtype):
    with pytest.raises(ValueError, match=f"input_ids.*int64.*{dtype}"):
        model(tokens(1, 5).to(dtype))


@pytest.mark.parametrize("shape", [(5,), (1, 2, 5)])
def test_shapes_of_tokens_and_embeddings(model, shape):
    with pytest.raises(ValueError, match=r"`input_ids` must have shape \(rows, tokens\), got"):
        model(tokens(*shape))
    for wrong in (shape, (1, 5, SMALL["hidden_size"] + 1)):
        with pytest.raises(ValueError, match=r"`inputs_embeds` must have shape \(rows, tokens, 24\), got"):
            model(inputs_embeds=torch.zeros(wrong))


def test_int32_tokens(model):
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 5).int()).logits, model(tokens(1, 5)).logits)


def test_empty_sequence(model):
    for use_cache in (False, True):
        with pytest.raises(ValueError, match="empty sequence"):
            model(torch.empty(2, 0, dtype=torch.long), use_cache=use_cache)


def test_ids_and_embeddings(model):
    embeds = model.get_input_embeddings()(tokens(1, 5))
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(tokens(1, 5), inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model()


def test_tokens_outside_of_the_vocabulary(model):
    with pytest.raises(IndexError):
        model(torch.tensor([[1, VOCAB]]))


@pytest.mark.parametrize("fields", family(aggregation=["grm", "ssc"], state_init=["independent"]), ids=name_of)
def test_short_sequences(fields):
    """One token, and less than a segment: no memory is finished, and the cache goes on from there."""
    model = build(small_config(**fields))
    ids = tokens(2, SIZE + 3)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for length in (1, 2, SIZE - 1):
            out = model(ids[:, :length], use_cache=True)
            assert_close(out.logits, whole[:, :length])
            rest = model(ids[:, length:], cache=out[CACHE_NAME]).logits
            assert_close(rest, whole[:, length:])


# -------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_a_row_of_padding_only(memory):
    """It disturbs nobody, gives finite values and gradients, and may become a real row later."""
    model = build(small_config(memory))
    ids, more = tokens(3, SIZE + 3), tokens(3, 4, seed=9)
    mask = torch.ones_like(ids)
    mask[1] = 0
    for use_cache in (False, True):
        out = model(ids, attention_mask=mask, use_cache=use_cache)
        assert out.logits.isfinite().all()
        for row in (0, 2):
            assert_close(out.logits[row], model(ids[row : row + 1]).logits[0])
    with torch.no_grad():
        later = model(more, attention_mask=torch.cat([mask, torch.ones_like(more)], 1), cache=out[CACHE_NAME])
        assert_close(later.logits[1], model(more[1:2]).logits[0])
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (3, 9), (1, 9), (9,), (2, 1, 9), (2, 1, 9, 9)])
def test_wrong_mask_shapes(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 9\).*"):
        model(tokens(2, 9), attention_mask=torch.ones(shape, dtype=torch.long))


def test_a_mask_that_covers_neither_all_nor_the_new_tokens(model):
    cache = MCCache(config=model.config)
    model(tokens(2, 9), cache=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 3), attention_mask=torch.ones(2, 2), cache=cache)


# ------------------------------------------------------------------------------------------------------------ packing
def test_packed_without_borders(model):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="cu_seq_lens_q.*seq_idx"):
        model(tokens(1, 5), position_ids=positions)


def test_packed_with_a_cache_or_several_rows(model):
    borders = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="batch of one row"):
        model(tokens(2, 5), cu_seq_lens_q=borders)
    cache = MCCache(config=model.config)
    model(tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="no cache"):
        model(tokens(1, 5), cu_seq_lens_q=borders, cache=cache)
    with pytest.raises(ValueError, match="no cache"):
        model(tokens(1, 5), cu_seq_lens_q=borders, cache=MCCache(config=model.config))
    with pytest.raises(ValueError, match="seq_idx"):
        model(tokens(2, 5), seq_idx=torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("borders", [[0, 2, 4], [0, 2, 6], [1, 5], [0, 3, 2, 5], [5], []], ids=str)
def test_borders_that_do_not_cover_the_tokens(model, borders):
    with pytest.raises(ValueError, match="cu_seq_lens_q.* 5"):
        model(tokens(1, 5), cu_seq_lens_q=torch.tensor(borders, dtype=torch.int32))


def test_document_numbers_that_do_not_cover_the_tokens(model):
    with pytest.raises(ValueError, match="seq_idx.*5"):
        model(tokens(1, 5), seq_idx=torch.zeros(1, 4, dtype=torch.long))


def test_packed_with_padding(model):
    borders, mask = torch.tensor([0, 2, 5]), torch.tensor([[1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="mask"):
        model(tokens(1, 5), attention_mask=mask, cu_seq_lens_q=borders)
    with torch.no_grad():
        expected = model(tokens(1, 5), cu_seq_lens_q=borders).logits
        assert torch.equal(
            model(tokens(1, 5), attention_mask=torch.ones_like(mask), cu_seq_lens_q=borders).logits, expected
        )


def test_empty_documents(model):
    with torch.no_grad():
        expected = model(tokens(1, 5), cu_seq_lens_q=torch.tensor([0, 2, 5])).logits
        borders = torch.tensor([0, 0, 2, 2, 2, 5, 5])
        assert_close(model(tokens(1, 5), cu_seq_lens_q=borders).logits, expected)


# -------------------------------------------------------------------------------------------------------------- heads
def test_a_cache_is_made_from_a_config(model):
    """By position too, where `DynamicCache` itself expects something else."""
    assert len(MCCache(model.config).memory_layers) == len(MCCache(config=model.config).memory_layers) > 0
    with pytest.raises(ValueError, match="`config` must be the model's config, got MCForCausalLM"):
        MCCache(model)


@pytest.mark.parametrize("kind", [MCCache, DynamicCache])
def test_a_cache_without_a_config(model, kind):
    with pytest.raises(ValueError, match="made without a config.*allowed.*config=model.config") as error:
        model(tokens(1, 5), cache=kind())
    assert "prefix" not in str(error.value)


@pytest.mark.parametrize(
    "make", [DynamicCache, lambda: (1, 2), lambda: MCCache(small_config())], ids=["empty", "tuple", "one-layer"]
)
@pytest.mark.parametrize("first", ["memory_caching", "full_attention"])
def test_what_is_no_cache_of_this_model(make, first):
    """Nothing in it, no cache at all, fewer layers than the model has."""
    model = build(small_config(num_hidden_layers=2, layer_types=[first, "memory_caching"]))
    for mask in (None, torch.ones(1, 5)):
        with pytest.raises(ValueError, match=r"`cache` \(\w+\) holds nothing for memory layer"):
            model(tokens(1, 5), attention_mask=mask, cache=make())


def test_attention_does_not_write_into_a_memory():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="belongs to another model"):
        llama(tokens(1, 5), **{CACHE_NAME: MCCache(small_config())})


def test_classification_of_a_batch_needs_a_padding_token():
    model = build(small_config(num_labels=3), MCForSequenceClassification)
    assert model(tokens(1, 5)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="padding"):
        model(tokens(2, 5))
