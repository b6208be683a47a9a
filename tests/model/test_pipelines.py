"""Ways in which models are used and measured: pipelines, quantised loading, the evaluation harness, any batch."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, pipeline

from helpers import assert_close, build, family, name_of, small_config, tokens
from mc_transformers import MCForCausalLM, MCForSequenceClassification, MCForTokenClassification, byte_tokenizer


BYTES = {"vocab_size": 258, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
TEXTS = ["one", "a longer text than the others, over several segments", "two words"]


def needs(package: str):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"the package {package} is not installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(small_config(**BYTES)).save_pretrained(folder)
    byte_tokenizer(512).save_pretrained(folder)
    return folder


def test_text_generation(saved, caplog):
    """From a folder, in batches with padding: every text as alone, and no word of an unsupported model."""
    write = pipeline("text-generation", str(saved), device="cpu")
    options = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False}
    alone = [write(text, **options)[0]["generated_text"] for text in TEXTS]
    together = [out[0]["generated_text"] for out in write(TEXTS, batch_size=3, **options)]
    assert together == alone
    assert len(set(alone)) == 3
    assert "not supported" not in caplog.text


@pytest.mark.parametrize(
    "task, cls",
    [("text-classification", MCForSequenceClassification), ("token-classification", MCForTokenClassification)],
)
def test_classification(tmp_path, task, cls):
    build(small_config(**BYTES, num_labels=3), cls).save_pretrained(tmp_path)
    classify = pipeline(task, str(tmp_path), tokenizer=byte_tokenizer(512), device="cpu")
    alone = [classify(text) for text in TEXTS]
    together = classify(TEXTS, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        one, other = (x[0] if isinstance(x, list) else x for x in (one, other))
        assert one.keys() == other.keys() and one["score"] == pytest.approx(other["score"], abs=1e-5)


@pytest.mark.parametrize("fields", family(state_init=["independent"], segmentation=["constant"]), ids=name_of)
def test_batch_invariance(fields):
    """A row's logits do not depend on who shares its batch, nor on how long the others are."""
    model = build(small_config(**fields, num_hidden_layers=2))
    rows = [tokens(length, seed=length) for length in (37, 5, 24, 1)]
    ids = torch.zeros(4, 37, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, real in enumerate(rows):
        ids[row, -len(real) :], mask[row, -len(real) :] = real, 1
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, real in enumerate(rows):
            assert_close(together[row, -len(real) :], model(real[None]).logits[0], 1e-4)


# --------------------------------------------------------------------------------------------------------- quantised
def check_quantised(model, exact) -> None:
    ids = tokens(2, 21)
    with torch.no_grad():
        found, expected = model(ids).logits.float(), exact(ids).logits
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (2, 26)


@needs("torchao")
def test_torchao(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    exact = build(small_config(head_dim=16, value_head_dim=16, hidden_size=32))
    exact.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = MCForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(model.model.layers[0].mixer.q_proj.weight) is not torch.nn.Parameter
    check_quantised(model.eval(), exact)


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path, bits):
    exact = build(small_config(head_dim=32, value_head_dim=32, hidden_size=64, intermediate_size=64))
    exact.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = MCForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="auto")
    assert "bitsandbytes" in type(model.model.layers[0].mixer.q_proj).__module__
    check_quantised(model.eval(), exact)


@pytest.mark.parametrize("memory", ["linear", "gated_delta", "titans", "lstm"])
def test_dynamic_quantisation(memory):
    """torch's own int8 linear layers on a CPU: they hold no `weight` tensor, so nothing may look for it."""
    exact = build(small_config(memory))
    model = torch.ao.quantization.quantize_dynamic(exact, {torch.nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(model.model.layers[0].mixer.q_proj).__module__
    with torch.no_grad():
        assert (model(tokens(2, 21)).logits - exact(tokens(2, 21)).logits).abs().max() > 0
    check_quantised(model, exact)


# --------------------------------------------------------------------------------------------------------- evaluation
@needs("lm_eval")
def test_lm_eval_through_a_launcher(saved, tmp_path):
    """The harness has no hook for plugins: a first line imports us, and the rest is its own command line."""
    task = tmp_path / "task.yaml"
    (tmp_path / "data.jsonl").write_text('{"text": "abc abc", "answer": "abc"}\n' * 4, encoding="utf-8")
    task.write_text(
        "task: tiny\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{answer}}'\n",
        encoding="utf-8",
    )
    launcher = "import mc_transformers, runpy; runpy.run_module('lm_eval', run_name='__main__')"
    arguments = ["--model", "hf", "--model_args", f"pretrained={saved}", "--tasks", "tiny", "--device", "cpu"]
    command = [sys.executable, "-c", launcher, *arguments, "--include_path", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True, capture_output=True)
    assert done.returncode == 0 and "tiny" in done.stdout, done.stderr[-3000:]


def test_loglikelihood_requests_are_right_padded_without_a_mask(saved):
    """What the harness does for log-likelihoods: harmless for a strictly causal model."""
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    row = tokens(1, 19)
    padded = torch.cat([row, tokens(1, 12, seed=5)], 1)
    with torch.no_grad():
        assert_close(model(padded).logits[:, :19], model(row).logits, 1e-5)
