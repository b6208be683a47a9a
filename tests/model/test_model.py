"""The family as Transformers sees it: Auto classes, heads, saving and loading, presets."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from helpers import MEMORY_NAMES, assert_close, build, combinations, name_of, small_config, tokens
from mc_transformers import (
    MC_LORA_TARGETS,
    MCConfig,
    MCForCausalLM,
    MCForQuestionAnswering,
    MCForSequenceClassification,
    MCForTokenClassification,
    MCModel,
)
from mc_transformers.configuration_mc import CHOICES, PRESETS
from mc_transformers.modeling_mc.compat import CACHE_NAME


HEADS = {
    AutoModel: MCModel,
    AutoModelForCausalLM: MCForCausalLM,
    AutoModelForSequenceClassification: MCForSequenceClassification,
    AutoModelForTokenClassification: MCForTokenClassification,
    AutoModelForQuestionAnswering: MCForQuestionAnswering,
}
CONFIG = {"num_hidden_layers": 2, "num_labels": 3, "pad_token_id": 0}


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_auto_classes(auto, tmp_path):
    """From a config, and from a checkpoint, where nothing else than the folder is known."""
    config = small_config(**CONFIG)
    model = auto.from_config(config)
    assert type(model) is HEADS[auto]
    model.save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is HEADS[auto]
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MCConfig and loaded.memory == config.memory


def content(config) -> dict:
    """What a config says of the model, without where it was loaded from and as what."""
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "architectures", "dtype")}


def state(model) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_save_and_load_is_bit_equal(memory, tied, tmp_path):
    model = build(small_config(memory, **CONFIG, tie_word_embeddings=tied))
    ids = tokens(2, 19)
    model.save_pretrained(tmp_path)
    weights = [path.name for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert weights == ["model.safetensors"]
    loaded, report = MCForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.eval()
    assert state(loaded).keys() == state(model).keys()
    assert all(torch.equal(state(loaded)[name], tensor) for name, tensor in state(model).items())
    shared = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert shared == tied
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert content(loaded.config) == content(model.config)


def test_tied_weights_train_as_one():
    model = build(small_config(tie_word_embeddings=True)).train()
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum("embed_tokens" in name or "lm_head" in name for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_loading_in_bf16_keeps_what_must_stay_fp32(memory, tmp_path):
    """Biases of gates and initial memories in fp32, everything else in bf16; near the fp32 model. Casting and making
    a model in bf16 do the same."""
    model = build(small_config(memory, **CONFIG))
    model.save_pretrained(tmp_path)
    loaded = MCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = [n for n, p in loaded.named_parameters() if p.dtype == torch.float32]
    assert all(p.dtype in (torch.float32, torch.bfloat16) for p in loaded.parameters())
    gates = [n for n, _ in model.named_parameters() if n.split(".")[-1] == "initial_state" or "_bias." in n]
    assert set(gates) <= set(kept)
    assert all("_proj" not in name and "embed" not in name and "lm_head" not in name for name in kept)
    for name in gates:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    ids = tokens(2, 19)
    with torch.no_grad():
        difference = (loaded(ids).logits.float() - model(ids).logits).abs()
    assert difference.mean() < 0.05
    made = MCForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    for other in (made, cast, copy.deepcopy(cast), copy.deepcopy(model).bfloat16(), cast.to("cpu")):
        assert {name: p.dtype for name, p in other.named_parameters()} == dtypes
    assert {name for name, p in copy.deepcopy(model).half().named_parameters() if p.dtype == torch.float32} == {*kept}
    assert all(torch.equal(cast.get_parameter(name), p) for name, p in loaded.named_parameters())
    with torch.no_grad():
        assert torch.equal(cast(ids).logits, loaded(ids).logits)
    for dtype in (torch.float64, torch.float32):
        assert {p.dtype for p in cast.to(dtype).parameters()} == {dtype}
    empty = cast.to("meta", torch.bfloat16)
    assert {name: p.dtype for name, p in empty.named_parameters()} == dtypes
    assert all(p.is_meta for p in empty.parameters())
    loaded.train()
    loaded(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in loaded.parameters())


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_initialisation(memory):
    """The same from a constructor and from `from_config` on the meta device; nothing is left uninitialised."""
    config = small_config(memory, num_hidden_layers=2)
    model = MCForCausalLM(config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 7, name
    with torch.device("meta"):
        empty = MCForCausalLM(config)
    empty = empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(torch.nan)
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.init_weights()
    for name, parameter in empty.named_parameters():
        expected = model.get_parameter(name)
        assert parameter.isfinite().all(), name
        if (expected == expected.flatten()[0]).all():  # ones, zeros, start values of gates
            assert torch.equal(parameter, expected), name
        else:
            assert 0.6 < parameter.std() / expected.std() < 1.6, name


# -------------------------------------------------------------------------------------------------------------- heads
def labels_for(cls, ids) -> dict:
    rows, length = ids.shape
    if cls is MCForSequenceClassification:
        return {"labels": torch.arange(rows) % 3}
    if cls is MCForTokenClassification:
        return {"labels": ids % 3}
    if cls is MCForQuestionAnswering:
        return {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 2}
    return {"labels": ids}


@pytest.mark.parametrize("cls", [x for x in HEADS.values() if x is not MCModel], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_heads_with_labels(memory, cls):
    """A loss with gradients everywhere, and rows that do not depend on their padding."""
    model = build(small_config(memory, **CONFIG), cls)
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    ids[ids == 0] = 1
    out = model(ids, attention_mask=mask, **labels_for(cls, ids))
    out.loss.backward()
    assert out.loss.isfinite()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not missing
    with torch.no_grad():
        left = model(torch.nn.functional.pad(ids, (4, 0)), attention_mask=torch.nn.functional.pad(mask, (4, 0)))
    name = "start_logits" if cls is MCForQuestionAnswering else "logits"
    shift = 0 if cls is MCForSequenceClassification else 4
    assert_close(left[name][:, shift:] if shift else left[name], out[name].detach(), 1e-3)


def test_outputs_of_all_kinds():
    model = build(small_config(**CONFIG))
    ids = tokens(2, 11)
    with torch.no_grad():
        full = model(ids, output_hidden_states=True, use_cache=False)
        assert len(full.hidden_states) == 3 and full.hidden_states[0].shape == (2, 11, 24)
        assert full.get(CACHE_NAME) is None
        assert torch.equal(model(ids, logits_to_keep=3).logits, full.logits[:, -3:])
        picked = torch.tensor([0, 4])
        assert torch.equal(model(ids, logits_to_keep=picked).logits, full.logits[:, picked])
        logits, cache = model(ids, return_dict=False)
        assert torch.equal(logits, full.logits) and cache.get_seq_length() == 11
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, full.logits)
        assert model(ids, use_cache=True)[CACHE_NAME].get_seq_length() == 11
        by_type = model(ids, attention_mask={"memory_caching": torch.ones(2, 11)}, use_cache=False)
        assert_close(by_type.logits, full.logits, 1e-6)


def test_loss_ignores_what_is_marked():
    model = build(small_config())
    ids = tokens(1, 9)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
        expected = torch.nn.functional.cross_entropy(out.logits[0, 4:-1], ids[0, 5:])
    assert_close(out.loss, expected, 1e-6)


# ------------------------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize("fields", combinations(memory=MEMORY_NAMES, aggregation=CHOICES["aggregation"]), ids=name_of)
def test_config_round_trip(fields, tmp_path):
    config = small_config(**fields, layer_types=["memory_caching"], summaries_per_segment=2)
    config.save_pretrained(tmp_path)
    for loaded in (MCConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert content(loaded) == content(config)
    assert content(MCConfig(**json.loads(config.to_json_string()))) == content(config)


def test_defaults_follow_from_other_fields():
    config = MCConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=3)
    assert config.head_dim == 24 and config.num_key_value_heads == 4
    assert config.layer_types == ["memory_caching"] * 3


SIZES = {"mc-170m": 170e6, "mc-340m": 340e6, "mc-760m": 760e6, "mc-1.3b": 1.3e9}


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.json")))
def test_presets(name):
    """Every preset makes a model, roughly of the size that the paper calls it by (it does not say how it counts)."""
    config = MCConfig.from_preset(name)
    with torch.device("meta"):
        model = MCForCausalLM(config)
    size = sum(p.numel() for p in model.parameters())
    assert size == pytest.approx(SIZES.get(name, size), rel=0.3)
    assert MCConfig.from_preset(name, memory="swla", segment_size=32).memory == "swla"


def test_lora_targets_exist():
    """Every target is a module of some model; every linear map of a model is a target or a gate or a head."""
    for memory in MEMORY_NAMES:
        model = build(small_config(memory))
        linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert {"q_proj", "k_proj", "v_proj", "u_proj", "g_proj", "o_proj", "up_proj"} <= linear & set(MC_LORA_TARGETS)
        low_rank = {"0", "2"} if memory == "rwkv7" else set()  # of its decay
        assert linear - set(MC_LORA_TARGETS) <= {"a_proj", "b_proj", "e_proj", "lm_head"} | low_rank


EVERY_MEMORY = [*combinations(memory=MEMORY_NAMES), {"memory": "lstm", "vector_read": "add"}]


@pytest.mark.parametrize("fields", EVERY_MEMORY, ids=name_of)
def test_offloaded_parameters_are_in_place(fields):
    """Offloading keeps weights away except while `forward` of their module runs."""
    model = build(small_config(**fields))
    ids = tokens(2, 20)
    with torch.no_grad():
        expected, written = model(ids, use_cache=False).logits, model.generate(ids, max_new_tokens=10, do_sample=False)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), written)


@pytest.mark.parametrize("kind", CHOICES["attention"])
def test_attention_of_hybrids(kind):
    """Each kind with each window: masked as it should be, decoded as in one pass, its weights returned."""
    layers = ["memory_caching", "full_attention", "sliding_attention"]
    model = build(small_config(num_hidden_layers=3, layer_types=layers, sliding_window=4, attention=kind))
    model.set_attn_implementation("eager")
    ids = tokens(1, 13)
    with torch.no_grad():
        out = model(ids, output_attentions=True, use_cache=False)
        _, full, sliding = (weights[0].abs().sum(0) > 0 for weights in out.attentions)  # of the memory layer: gates
        assert torch.equal(full, torch.ones(13, 13).tril().bool())
        assert torch.equal(sliding, full & ~torch.ones(13, 13).tril(-4).bool())
        cache = model(ids[:, :7], use_cache=True)[CACHE_NAME]
        assert_close(model(ids[:, 7:8], cache=cache).logits, out.logits[:, 7:8])
