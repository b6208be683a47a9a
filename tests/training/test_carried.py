"""Training with carried memories: piece by piece it is what a pass over the whole document is."""

import copy
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import assert_close, build, family, name_of, small_config, tokens
from mc_transformers import MCCache, MCForCausalLM
from mc_transformers.training import CarriedTrainer, DocumentRows
from mc_transformers.training.carried import Carried, summed_loss


SIZE = 4
FIELDS = {"segment_size": SIZE, "memory_chunk_size": 2}
READS = [
    {"aggregation": "grm"},
    {"aggregation": "ssc", "max_cached_segments": 3},
    {"aggregation": "grm", "max_cached_segments": 2, "cache_eviction": "least_read"},
    {"aggregation": "residual", "segmentation": "logarithmic"},
    {"aggregation": "grm", "state_init": "checkpoint"},
    {"aggregation": "none"},
]
EVERY = family(aggregation=["grm"], segmentation=["constant"]) + [{"memory": "titans", **fields} for fields in READS]
LENGTHS = (11, 5, 2, 9)


def documents(lengths=LENGTHS) -> list[dict]:
    return [{"input_ids": tokens(length, seed=i).tolist()} for i, length in enumerate(lengths)]


def batches(rows: DocumentRows) -> list[dict[str, torch.Tensor]]:
    items = [rows[i] for i in range(len(rows))]
    return [
        {name: torch.stack([item[name] for item in items[i : i + rows.rows]]) for name in items[0]}
        for i in range(0, len(items), rows.rows)
    ]


def gradients_of(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole(model, texts: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss and its gradients of one pass per document."""
    total = torch.zeros((), dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([text["input_ids"]])
        labels = torch.cat([ids.new_full((1, 1), -100), ids[:, 1:]], 1)
        loss = summed_loss(model(ids[:, :-1], use_cache=False).logits, labels)
        loss.backward()
        total += loss.detach()
    return total, gradients_of(model)


def in_pieces(model, rows: DocumentRows) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    total, carried = torch.zeros((), dtype=torch.float64), Carried(model.config)
    for batch in batches(rows):
        loss = summed_loss(carried.read(model, batch), batch["labels"])
        loss.backward()
        total += loss.detach()
    return total, gradients_of(model)


# --------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("rows, piece, window", [(1, 4, 1), (2, 8, 1), (3, 4, 3), (5, 4, 2)])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_token_of_every_document_is_asked_for_once_and_in_order(rows, piece, window, seed):
    texts = [{"input_ids": list(range(100 * i, 100 * i + n))} for i, n in enumerate(LENGTHS)]
    data, read = DocumentRows(texts, rows, piece, window, seed), [[] for _ in range(rows)]
    asked = []
    for step, batch in enumerate(batches(data)):
        for row in range(rows):
            ids, mask, begins = (batch[name][row] for name in ("input_ids", "attention_mask", "begins"))
            real = ids[-1][mask[-1] != 0].tolist()
            labels = batch["labels"][row]
            assert labels[0] == -100 and labels[1:][labels[1:] != -100].tolist() == [t + 1 for t in real]
            asked += [t + 1 for t in real]
            assert bool(begins[-1]) == (bool(real) and real[0] % 100 == 0)
            read[row].append((ids[-1], mask[-1], begins[-1]))
            for place in range(window - 1):  # what is read again is what was new before
                at = step - window + 1 + place
                if at < 0:
                    assert not mask[place].any() and not begins[place]
                else:
                    for now, then in zip((ids, mask, begins), read[row][at], strict=True):
                        assert torch.equal(now[place], then)
    assert sorted(asked) == sorted(t for text in texts for t in text["input_ids"][1:])
    for row in read:  # a document after the other, each from its begin to its end
        line = [t for ids, mask, _ in row for t in ids[mask != 0].tolist()]
        assert all(b == a + 1 or b % 100 == 0 for a, b in zip(line, line[1:], strict=False))


def test_epochs_differ_in_their_order_only():
    texts = documents()
    data = DocumentRows(texts, 2, 4, seed=1)
    first = batches(data)
    data.set_epoch(1)
    second = batches(data)
    data.set_epoch(0)
    assert len(first) == len(second) and any(
        not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
    for again, before in zip(batches(data), first, strict=True):
        assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 0}, "`rows`=0"),
        ({"piece": 0}, "`piece`=0"),
        ({"window": 0}, "`window`=0"),
        ({"documents": []}, "one or more"),
        ({"documents": [{"input_ids": [3]}]}, "two tokens"),
    ],
)
def test_bad_rows(change, message):
    with pytest.raises(ValueError, match=message):
        DocumentRows(**{"documents": documents(), "rows": 2, "piece": 4} | change)


# --------------------------------------------------------------------------------------------------------------- math
@pytest.mark.parametrize("fields", EVERY, ids=name_of)
def test_the_loss_is_that_of_whole_documents_and_so_is_the_gradient_through_all_segments(fields):
    """Two rows, documents of different lengths one after the other; float64."""
    texts = documents()
    model = build(small_config(**FIELDS | fields, num_hidden_layers=2), dtype=torch.float64).train()
    expected, wanted = whole(model, texts)
    window = math.ceil(max(LENGTHS) / SIZE)
    for part, full in ((1, False), (window, True)):
        total, found = in_pieces(model, DocumentRows(texts, 2, SIZE, part))
        assert_close(total, expected, 1e-10, "loss")
        assert found.keys() == wanted.keys()
        if full:
            for name, gradient in wanted.items():
                assert_close(found[name], gradient, 1e-9, name)


def test_fewer_segments_cut_the_gradient_and_nothing_else():
    """Gradients of n segments go from the truncated to the full one, and two pieces of one segment are one of two."""
    texts = documents((4 * SIZE + 1,))
    model = build(small_config("gated_linear", **FIELDS, num_hidden_layers=2), dtype=torch.float64).train()
    _, wanted = whole(model, texts)
    errors = []
    for window in (1, 2, 4):
        _, found = in_pieces(model, DocumentRows(texts, 1, SIZE, window))
        errors.append(sum((found[name] - gradient).norm() for name, gradient in wanted.items()).item())
    assert errors[0] > errors[1] > 1e-3 and errors[2] < 1e-9


@pytest.mark.parametrize("memory", ["dla", "titans"])
def test_first_states_learn_from_every_segment_that_begins(memory):
    """A piece that begins a segment behind a detached cache starts from M_0 itself."""
    model = build(small_config(memory, **FIELDS), dtype=torch.float64).train()
    first = [p for name, p in model.named_parameters() if "initial" in name]
    assert first
    cache = MCCache(model.config)
    model(tokens(1, 2 * SIZE), cache=cache)
    loss = model(tokens(1, SIZE, seed=2), cache=cache.detached()).logits.square().sum()
    for gradient in torch.autograd.grad(loss, first):
        assert gradient.abs().max() > 1e-6
    loss = model(tokens(1, SIZE, seed=2), cache=cache).logits.square().sum()
    assert torch.autograd.grad(loss, first)


# -------------------------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("fields", EVERY + [{"memory": "linear", "state_dtype": torch.int8}], ids=name_of)
def test_rows_that_begin_anew_are_rows_of_a_new_cache(fields):
    fields = dict(fields)
    dtype = fields.pop("state_dtype", None)
    model = build(small_config(**FIELDS | fields, num_hidden_layers=2), dtype=torch.float64)
    first, second, third = (tokens(3, length, seed=length) for length in (22, 7, 5))
    with torch.no_grad():
        cache = MCCache(model.config, state_dtype=dtype)
        cache.begin_rows(torch.ones(3, dtype=torch.bool), model)  # nothing to forget
        model(first, cache=cache)
        large = cache.nbytes
        cache.begin_rows(torch.tensor([False, True, False]), model)
        assert cache.nbytes == large and cache.get_seq_length() == 22
        model(second, cache=cache)
        for row in range(3):
            alone = MCCache(model.config, state_dtype=dtype)
            if row != 1:
                model(first[row : row + 1], cache=alone)
            model(second[row : row + 1], cache=alone)
            for part in (third, tokens(3, 1, seed=9)):  # whole, and token by token
                here = copy.deepcopy(cache)
                expected = model(part[row : row + 1], cache=copy.deepcopy(alone)).logits
                assert_close(model(part, cache=here).logits[row : row + 1], expected, 1e-9, f"row {row}")
        cache.begin_rows(torch.tensor([True, False, True]), model)
        assert cache.get_seq_length() == 7 and cache.nbytes <= large
        if "max_cached_segments" not in fields and fields.get("aggregation") != "none":
            assert cache.nbytes < large
        expected = MCCache(model.config, state_dtype=dtype)
        wanted = model(third[:1], cache=expected).logits
        assert_close(model(third[[0, 0, 0]], cache=cache).logits[[0, 2]], wanted.expand(2, -1, -1), 1e-9)


def test_a_detached_cache_is_a_copy():
    model = build(small_config(**FIELDS))
    cache = MCCache(model.config)
    model(tokens(2, 9), cache=cache)
    other = cache.detached()
    assert all(not t.requires_grad for layer in other.memory_layers for t in layer.tensors.values())
    expected = model(tokens(2, 3), cache=copy.deepcopy(other)).logits
    with torch.inference_mode():
        model(tokens(2, 9), cache=other)
    assert cache.get_seq_length() == 9 and other.get_seq_length() == 18
    assert torch.equal(model(tokens(2, 3), cache=cache.detached()).logits, expected)


def test_bad_rows_to_begin():
    model = build(small_config(**FIELDS))
    cache = MCCache(model.config)
    model(tokens(2, 9), cache=cache)
    for rows in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match=r"`rows` must be bool of shape \(2,\)"):
            cache.begin_rows(rows, model)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="records nothing"):
        cache.begin_rows(torch.ones(2, dtype=torch.bool), model)


# ------------------------------------------------------------------------------------------------------------ trainer
def trainer(folder, model=None, **options) -> CarriedTrainer:
    own = {name: options.pop(name) for name in ("piece_segments", "gradient_segments") if name in options}
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | options
    )
    if model is None:
        model = build(small_config("gated_linear", **FIELDS, num_hidden_layers=2))
    return CarriedTrainer(model, args, train_dataset=documents(), eval_dataset=documents(LENGTHS[::-1]), **own)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trainer_learns_and_evaluates_whole_documents(tmp_path):
    run = trainer(tmp_path, num_train_epochs=8, gradient_segments=2)
    texts = documents(LENGTHS[::-1])
    count = sum(len(text["input_ids"]) - 1 for text in texts)
    before = run.evaluate()["eval_loss"]
    assert before == pytest.approx(whole(run.model, texts)[0].item() / count, rel=1e-5)
    run.train()
    assert losses(run)[-1] < losses(run)[0] and run.state.log_history[-1]["train_loss"] > 0
    assert run.evaluate(documents())["eval_loss"] < before


def test_the_logged_losses_are_those_of_one_pass(tmp_path):
    """Nothing is learned; accumulated over a whole epoch, the loss is the mean over all tokens."""
    steps = DocumentRows(documents(), 2, SIZE).steps
    run = trainer(tmp_path, learning_rate=0.0, num_train_epochs=1, gradient_accumulation_steps=steps)
    total, _ = whole(run.model, documents())
    run.train()
    count = sum(length - 1 for length in LENGTHS)
    assert losses(run) == pytest.approx([total.item() / count], abs=1e-4)


@pytest.mark.parametrize("gradient_segments", [1, 3])
def test_resume_in_the_middle(tmp_path, gradient_segments):
    """In the middle of documents, in the second epoch: the same losses, weights and memories."""
    steps = DocumentRows(documents(), 2, SIZE).steps
    middle = steps + steps // 2
    plain = trainer(tmp_path / "plain", gradient_segments=gradient_segments)
    plain.train()
    trainer(tmp_path / "a", gradient_segments=gradient_segments, save_strategy="steps", save_steps=middle).train()
    other = build(small_config("gated_linear", **FIELDS, num_hidden_layers=2), seed=5)
    again = trainer(tmp_path / "a", other, gradient_segments=gradient_segments)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{middle}"))
    assert losses(again) == losses(plain) and len(losses(plain)) == 2 * steps
    for (name, weight), expected in zip(again.model.named_parameters(), plain.model.parameters(), strict=True):
        assert_close(weight, expected, 1e-6, name)
    for layer, expected in zip(again.carried.cache.memory_layers, plain.carried.cache.memory_layers, strict=True):
        for name, tensor in expected.tensors.items():
            assert torch.allclose(layer.tensors[name], tensor, atol=1e-6), name
    with pytest.raises(FileNotFoundError, match="carried-0"):
        (tmp_path / "a" / "checkpoint-9").mkdir()
        trainer(tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-9"))


def test_an_adapter_trains_with_carried_memories(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build(small_config("gated_linear", **FIELDS, num_hidden_layers=2))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    run = trainer(tmp_path, adapted, save_strategy="steps", save_steps=2, max_steps=4)
    run.train()
    again = trainer(tmp_path, adapted, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(run) == losses(again)[:4] and len(losses(again)) == 6
    changed = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert changed and all("lora" in name for name in changed)


def test_bad_options(tmp_path):
    for options, message in (
        ({"piece_segments": 0}, "`piece_segments`=0"),
        ({"piece_segments": 2, "gradient_segments": 3}, "`gradient_segments`=3"),
        ({"gradient_checkpointing": True}, "`gradient_checkpointing`"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **options)
    hybrid = MCForCausalLM(
        small_config(num_hidden_layers=2, layer_types=["memory_caching", "full_attention"], num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="`layer_types`"):
        trainer(tmp_path, hybrid)
