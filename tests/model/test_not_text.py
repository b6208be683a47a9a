"""Sequences that are not text: embeddings in the place of tokens train and generate, and a number as the answer."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from helpers import MEMORY_NAMES, assert_close, build, small_config, tokens
from mc_transformers import MCCache, MCForCausalLM, MCForSequenceClassification, MCModel


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_embeddings_train_what_made_them(memory):
    """Gradients of the same loss, by ids and by their embeddings, over segment borders."""
    model, ids = build(small_config(memory), dtype=torch.float64).train(), tokens(2, 29)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    embeds = model.get_input_embeddings()(ids)
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-9, name)


@pytest.mark.parametrize("cached", [False, True])
def test_generation_goes_on_from_embeddings(cached):
    model, ids = build(small_config("gated_delta", num_hidden_layers=2)), tokens(2, 29)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 29:]
    cache = MCCache(model.config) if cached else None
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, cache=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)
    if cached:
        assert cache.get_seq_length() == 40 and cache.num_segments == 5


def test_a_trainer_takes_embeddings(tmp_path):
    """A series of numbers through a linear map, with the model as the part of another one that Trainer trains."""

    class Series(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.model = nn.Linear(1, 24), MCModel(small_config("gated_linear"))
            self.output = nn.Linear(24, 1)

        def forward(self, series: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden = self.model(inputs_embeds=self.inputs(series), use_cache=False).last_hidden_state
            return {"loss": nn.functional.mse_loss(self.output(hidden), labels)}

    torch.manual_seed(0)
    waves = torch.sin(torch.arange(41) * 0.7 + torch.arange(8)[:, None])[..., None]
    rows = [{"series": wave[:-1], "labels": wave[1:]} for wave in waves]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=60,
        learning_rate=1e-2,
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    run = Trainer(Series(), args, train_dataset=rows)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]


def test_regression_by_the_convention_of_transformers(tmp_path):
    """`num_labels=1`: a number per row, the mean squared error; from ids and from embeddings."""
    model = build(small_config(num_labels=1, pad_token_id=0), MCForSequenceClassification)
    ids, labels = tokens(4, 20).clamp(min=1), torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = model(ids, labels=labels)
    assert out.logits.shape == (4, 1) and model.config.problem_type == "regression"
    assert_close(out.loss, (out.logits[:, 0] - labels).square().mean(), 1e-6)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds, labels=labels).logits, out.logits, 1e-6)
    model.save_pretrained(tmp_path)
    again = MCForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.problem_type == "regression"
    assert_close(again(ids, labels=labels).loss, out.loss, 1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2 * out.loss


def test_a_language_model_over_codes_has_no_tokenizer():
    """Four letters are a vocabulary."""
    model = build(small_config(vocab_size=4), MCForCausalLM)
    assert model(tokens(2, 30) % 4).logits.shape == (2, 30, 4)
