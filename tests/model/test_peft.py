"""Adapters: LoRA and its relatives reach every projection, because each is called as a module."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

from helpers import MEMORY_NAMES, assert_close, build, small_config, tokens
from mc_transformers import MC_LORA_TARGETS, MCForCausalLM


RANK = 3
PROMPT = tokens(2, 21)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(PROMPT)}


def wild_adapter(model: PeftModel) -> PeftModel:
    """Adapters start without effect: give them one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            if "lora_magnitude" in name:
                parameter.mul_(1.3)
    return model.eval()


def adapted(config: LoraConfig, memory: str = "gated_linear", **fields) -> PeftModel:
    model = build(small_config(memory, num_hidden_layers=2, **fields))
    return wild_adapter(get_peft_model(model, config))


def lora(**options) -> LoraConfig:
    return LoraConfig(r=RANK, task_type=TaskType.CAUSAL_LM, **options)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=PROMPT).logits


def leaves(model, suffix: str = "lora_A") -> set[str]:
    """Names of the modules that were adapted."""
    names = (name.split(f".{suffix}")[0] for name, _ in model.named_parameters() if f".{suffix}" in name)
    return {name.rsplit(".", 1)[1] for name in names}


KINDS = {
    "named": {"target_modules": MC_LORA_TARGETS},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": MC_LORA_TARGETS, "use_dora": True},
    "rslora": {"target_modules": MC_LORA_TARGETS, "use_rslora": True, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("memory", MEMORY_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_unload_save_load(tmp_path, memory, kind):
    model = adapted(lora(**KINDS[kind]), memory)
    plain = logits(build(small_config(memory, num_hidden_layers=2)))
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.01
    with model.disable_adapter():
        assert_close(logits(model), plain, 1e-6, "disabled")
    model.save_pretrained(tmp_path)
    base = build(small_config(memory, num_hidden_layers=2))
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(logits(again), expected, 1e-6, "loaded")
    assert_close(logits(again.merge_and_unload()), expected, 1e-4, "merged")
    assert_close(logits(model.unload()), plain, 1e-6, "unloaded")


@pytest.mark.parametrize("kind", ["named", "all-linear"])
def test_targets(kind):
    """Every projection, in attention layers of a hybrid too; "all-linear" takes the gates' too, never the head."""
    hybrid = {"layer_types": ["memory_caching", "full_attention"]}
    found = leaves(adapted(lora(**KINDS[kind]), "gated_linear", **hybrid))
    assert found == set(MC_LORA_TARGETS) | ({"a_proj"} if kind == "all-linear" else set())
    model = adapted(lora(**KINDS[kind]), "gated_linear", **hybrid)
    layers = {name.split("layers.")[1][0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert layers == {"0", "1"}


def test_default_targets_without_a_word(recwarn):
    assert leaves(adapted(lora())) == set(MC_LORA_TARGETS)
    assert not [str(w.message) for w in recwarn if "target" in str(w.message)]


def test_every_adapter_gets_a_gradient():
    model = adapted(lora(**KINDS["all-linear"]), "titans").train()
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_adapted_decoding_is_adapted_prefill():
    model = adapted(lora(**KINDS["named"]), "gated_delta")
    ids = model.generate(input_ids=PROMPT, **GREEDY)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(whole[:, PROMPT.shape[1] - 1 : -1].argmax(-1), ids[:, PROMPT.shape[1] :])


def test_two_adapters_in_one_batch():
    model = adapted(lora(**KINDS["named"]))
    model.add_adapter("other", lora(**KINDS["named"]))
    torch.manual_seed(3)
    wild_adapter(model)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with torch.no_grad():
        mixed = model(input_ids=PROMPT, adapter_names=["other", "default"]).logits
        mixed_base = model(input_ids=PROMPT, adapter_names=["__base__", "other"]).logits
    assert (alone["other"] - alone["default"]).abs().max() > 0.01
    assert_close(mixed[0], alone["other"][0], 1e-5)
    assert_close(mixed[1], alone["default"][1], 1e-5)
    assert_close(mixed_base[0], logits(build(small_config("gated_linear", num_hidden_layers=2)))[0], 1e-5)
    out = model.generate(input_ids=PROMPT, adapter_names=["other", "default"], **GREEDY)
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        one = model.generate(input_ids=PROMPT[row : row + 1], **GREEDY | {"attention_mask": None})
        assert torch.equal(one[0], out[row])


@pytest.mark.usefixtures("any_peft")
def test_transformers_own_adapter_interface(tmp_path):
    """`model.add_adapter` of Transformers, without a PeftModel."""
    model = build(small_config())
    plain = logits(model)
    model.add_adapter(lora(**KINDS["named"]))
    wild_adapter(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = build(small_config())
    again.load_adapter(str(tmp_path))
    assert_close(logits(again), expected, 1e-6)
    model.disable_adapters()
    assert_close(logits(model), plain, 1e-6)


def test_modules_to_save_and_the_head():
    config = lora(target_modules=MC_LORA_TARGETS, modules_to_save=["lm_head"])
    trainable = {name for name, p in adapted(config).named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trainable) == 1 and "lm_head" in trainable.pop()


# ------------------------------------------------------------------------------------------------------------ prompts
def test_prompt_tuning():
    """Virtual tokens are read like real ones: the same as their embeddings in front."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    model = get_peft_model(build(small_config()), config).eval()
    virtual = model.get_prompt(batch_size=2)
    embeds = torch.cat([virtual, model.get_input_embeddings()(PROMPT)], 1)
    with torch.no_grad():
        expected = model.base_model(inputs_embeds=embeds).logits
        assert_close(model(input_ids=PROMPT).logits[:, -PROMPT.shape[1] :], expected[:, 5:], 1e-5)
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.abs().max() > 0
    out = model.generate(input_ids=PROMPT, **GREEDY)
    assert out[0, PROMPT.shape[1]] == expected[0, -1].argmax()


def test_prefix_tuning_is_refused():
    """Its keys and values belong to attention: a memory layer has nowhere to put them."""
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    model = get_peft_model(build(small_config(num_hidden_layers=2)), config)
    with pytest.raises(ValueError, match="prefix tuning"):
        model(input_ids=PROMPT)


def test_peft_is_optional():
    """Our default reaches PEFT's table only because this file imports PEFT."""
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    table.pop("mc", None)
    MCForCausalLM(small_config())
    assert table["mc"] == MC_LORA_TARGETS
