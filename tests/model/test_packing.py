"""Packed documents through the Trainer: a pack as its own collator makes it trains like the documents alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from helpers import assert_close, build, small_config, tokens


LENGTHS = [5, 8, 1, 17, 2, 24, 3, 9]
MARKED = {"return_flash_attn_kwargs": True, "return_seq_idx": True}


def documents() -> list[dict]:
    return [{"input_ids": tokens(length, seed=length).tolist()} for length in LENGTHS]


def trained(tmp_path, model, batch_size: int, collator: DataCollatorWithFlattening | None) -> Trainer:
    """One step on all documents at once, or one after the other with their gradients summed."""
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_accumulation_steps=len(LENGTHS) // batch_size,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    data = documents()
    if collator is None:
        data = [{**row, "labels": row["input_ids"]} for row in data]
    run = Trainer(model, args, train_dataset=data, data_collator=collator)
    run.train()
    return run


def logged_loss(run: Trainer) -> float:
    return next(entry["loss"] for entry in run.state.log_history if "loss" in entry)


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("kind", ["linear", "titans", "hybrid"])
def test_packed_training_is_training_on_the_documents_alone(tmp_path, kind, batch_size):
    """Loss and weights after a step; every token weighs the same, in whatever pack it stands."""
    fields = {"layer_types": ["memory_caching", "full_attention"]} if kind == "hybrid" else {"memory": kind}
    config = small_config(**{"num_hidden_layers": 2} | fields)
    # (a document of one token has no label: as a batch of its own it adds nothing)
    alone = trained(tmp_path, build(config), 1, None)
    packed = trained(tmp_path, build(config), batch_size, DataCollatorWithFlattening(**MARKED))
    assert logged_loss(packed) == pytest.approx(logged_loss(alone), rel=1e-4)
    others = dict(packed.model.named_parameters())
    start = dict(build(config).named_parameters())
    for name, parameter in alone.model.named_parameters():
        moved = others[name].detach() - start[name].detach()
        assert_close(moved, parameter.detach() - start[name].detach(), 1e-3, name)


def test_unmarked_packing_is_refused(tmp_path):
    """By default the collator tells documents apart by `position_ids` only."""
    with pytest.raises(ValueError, match="return_flash_attn_kwargs=True, return_seq_idx=True"):
        trained(tmp_path, build(small_config()), 8, DataCollatorWithFlattening())


def test_positions_that_do_not_restart_are_accepted():
    model = build(small_config())
    ids, positions = tokens(1, 20), torch.arange(7, 27)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 10])}, "batch of one row"),
        ({"seq_idx": torch.zeros(2, 10, dtype=torch.int32)}, "seq_idx"),
    ],
)
def test_packed_batches_have_one_row(given, message):
    with pytest.raises(ValueError, match=message):
        build(small_config())(tokens(2, 10), use_cache=False, **given)
