"""Masks and batches that have no meaning: refused with what to do, and nothing is read wrongly."""

import pytest
import torch

from helpers import assert_close, build, small_config, tokens
from mc_transformers.configuration_mc import CHOICES


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), torch.finfo(torch.float32).min, 0.5, 2.0])
@torch.no_grad()
def test_masks_of_other_values(value):
    model, ids = build(small_config("linear")), tokens(2, 12)
    mask = torch.ones(2, 12)
    mask[0, :3] = 0
    assert_close(model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask.long()).logits)
    mask[1, 2] = value
    with pytest.raises(ValueError, match="`attention_mask` .* allowed: 1 = a token, 0 = padding.*`mask == 0`"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("aggregation", CHOICES["aggregation"])
def test_a_batch_of_no_rows(aggregation):
    model, none = build(small_config("linear", aggregation=aggregation)), torch.zeros(0, 5, dtype=torch.long)
    for use in (model, model.generate):
        with pytest.raises(ValueError, match="no rows|at least one|empty"):
            use(none)
    with pytest.raises(ValueError, match="`inputs_embeds` must have shape"):
        model(inputs_embeds=torch.zeros(0, 5, model.config.hidden_size))
