"""Transformers' Trainer on these models: what users switch on works, and needs no code of their own."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from helpers import MEMORY_NAMES, VOCAB, assert_close, build, small_config, tokens
from mc_transformers import MCForCausalLM, MCForSequenceClassification


LENGTH = 20
STEPS = 6


class Rows(Dataset):
    """Rows of tokens with right padding, so that rows differ in how many labels they have."""

    def __init__(self, count: int = 24, padded: bool = True) -> None:
        self.rows = []
        for row in range(count):
            ids, real = tokens(LENGTH, seed=row), LENGTH - row % 7 if padded else LENGTH
            mask = (torch.arange(LENGTH) < real).long()
            labels = ids.masked_fill(mask == 0, -100)
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def trainer(folder, model=None, data=None, **options) -> Trainer:
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | options
    if model is None:
        model = build(small_config("gated_linear", num_hidden_layers=2))
    args = TrainingArguments(**options)
    return Trainer(model=model, args=args, train_dataset=data or Rows(), eval_dataset=Rows(4))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def check_same_run(first: Trainer, second: Trainer, tolerance: float = 1e-5) -> None:
    assert len(losses(first)) == len(losses(second)) > 0
    for a, b in zip(losses(first), losses(second), strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=1e-4)  # the log rounds to four digits
    others = weights(second)
    for name, weight in weights(first).items():
        assert_close(weight, others[name], tolerance, name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("plain"))
    run.train()
    return run


def test_resume_from_checkpoint(plain, tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=STEPS // 2).train()
    again = trainer(tmp_path, model=build(small_config("gated_linear", num_hidden_layers=2), seed=5))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert again.state.global_step == STEPS
    check_same_run(plain, again, 1e-6)


def test_gradient_accumulation(plain, tmp_path):
    """Rows with different numbers of labels weigh by their tokens, however they are split."""
    run = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    run.train()
    check_same_run(plain, run, 1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(plain, tmp_path, use_cache, reentrant):
    kwargs = {"use_reentrant": reentrant}
    run = trainer(tmp_path, use_cache=use_cache, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    run.train()
    check_same_run(plain, run)


def test_compiled(plain, tmp_path):
    run = trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    run.train()
    check_same_run(plain, run, 1e-4)


@pytest.mark.parametrize("memory", ["gated_delta", "titans"])
def test_bf16(tmp_path, memory):
    """Autocast keeps the weights in fp32, and the loss stays near the one in fp32."""
    curves = []
    for bf16 in (False, True):
        run = trainer(tmp_path, MCForCausalLM(small_config(memory)), Rows(padded=False), bf16=bf16)
        run.train()
        assert {weight.dtype for weight in weights(run).values()} == {torch.float32}
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


def test_label_smoothing(tmp_path):
    """The loss of the first step by hand: one part in ten from all tokens alike."""
    model = build(small_config())
    batch = {key: torch.stack([row[key] for row in Rows(4).rows]) for key in ("input_ids", "attention_mask", "labels")}
    labels = batch.pop("labels")[:, 1:]
    log_probs = F.log_softmax(model(**batch).logits[:, :-1], -1)
    own = -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    real = labels != -100
    expected = (0.9 * own + 0.1 * -log_probs.mean(-1))[real].mean().item()
    run = trainer(tmp_path, model, Rows(4), label_smoothing_factor=0.1, max_steps=1)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-3)


def test_evaluation_does_not_gather_the_cache(tmp_path):
    data = Rows(5)
    out = trainer(tmp_path, use_cache=True).predict(data)
    assert out.predictions.shape == (5, LENGTH, VOCAB)  # a tuple if the cache came along
    labels = torch.stack([row["labels"] for row in data.rows])
    loss = F.cross_entropy(torch.from_numpy(out.predictions)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-3)


NO_DECAY = ("_bias.", "A_log", "initial_state", "norm", ".bias", "bias_ih", "bias_hh")


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_weight_decay_spares_decays_biases_norms_and_initial_states(tmp_path, memory):
    """The Trainer's own choice by name; the projections and the embedding do decay."""
    fields = {"aggregation": "grm", "mlp_bias": True, "layer_types": ["memory_caching", "full_attention"]}
    model = MCForCausalLM(small_config(memory, num_hidden_layers=2, num_key_value_heads=2, **fields))
    run = trainer(tmp_path, model, weight_decay=0.1)
    run.create_optimizer()
    decayed = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = not any(part in name for part in NO_DECAY)
        assert (id(parameter) in decayed) == expected, name
    assert id(model.model.layers[0].mixer.q_proj.weight) in decayed


def test_classifier(tmp_path):
    model = build(small_config(num_labels=3, pad_token_id=0), MCForSequenceClassification)
    data = Rows(8)
    for row, label in zip(data.rows, [0, 1, 2] * 3, strict=False):
        row["labels"] = torch.tensor(label)
    run = trainer(tmp_path, model, data, max_steps=40, learning_rate=1e-2)
    run.train()
    assert losses(run)[-1] < 0.3 < losses(run)[0]


def test_best_model(tmp_path):
    """Evaluation while training, the best checkpoint at the end, exported as a model that loads."""
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    run.train()
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    run.save_model(str(tmp_path / "final"))
    with_code = [path.parent.name for path in tmp_path.rglob("modeling_mc.py")]
    assert with_code == ["final"] and any(tmp_path.glob("checkpoint-*"))
    for folder in tmp_path.iterdir():  # none names code that is not there
        assert ("auto_map" in json.loads((folder / "config.json").read_text())) == (folder.name in with_code)
    again = trainer(tmp_path, MCForCausalLM.from_pretrained(tmp_path / "final"))
    assert math.isclose(again.evaluate()["eval_loss"], best, rel_tol=1e-5)
