"""Training: what changes speed or memory changes neither loss nor gradients, and activations grow with the tokens."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from helpers import MEMORY_NAMES, assert_close, build, family, name_of, small_config, tokens
from mc_transformers import MCCache, MCForCausalLM
from mc_transformers.modeling_mc.compat import CACHE_NAME
from mc_transformers.modeling_mc.model import MCDecoderLayer


SIZE = 8
EACH = family(aggregation=["grm", "ssc"], state_init=["independent"], segmentation=["constant"])
LOGARITHMIC = family(memory=["linear"], aggregation=["grm", "residual"], segmentation=["logarithmic"])


def loss_and_gradients(model, ids, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(actual, expected, tolerance: float) -> None:
    (loss, gradients), (wanted, others) = actual, expected
    assert gradients.keys() == others.keys()
    assert_close(loss, wanted, tolerance, "loss")
    for name, gradient in others.items():
        assert_close(gradients[name], gradient, tolerance, name)


@pytest.mark.parametrize("fields", family(), ids=name_of)
def test_gradients_reach_every_parameter(fields):
    model = build(small_config(**fields)).train()
    _, gradients = loss_and_gradients(model, tokens(2, 3 * SIZE + 3))
    for name, parameter in model.named_parameters():
        assert name in gradients and gradients[name].isfinite().all(), name
        assert gradients[name].abs().max() > 1e-7, name
        assert gradients[name].dtype == parameter.dtype


@pytest.mark.parametrize("fields", EACH + LOGARITHMIC, ids=name_of)
def test_gradient_checkpointing(fields):
    model = build(small_config(**fields, num_hidden_layers=2)).train()
    ids = tokens(2, 3 * SIZE + 3)
    expected = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    runs = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: runs.append(1))
    actual = loss_and_gradients(model, ids)
    handle.remove()
    assert len(runs) == 2  # it ran again in the backward
    check(actual, expected, 1e-6)


def test_gradients_of_a_few_parameters_through_a_cache():
    """What decoding keeps of a frozen layer has no gradient itself, but that of its queries and gates needs it."""
    model, ids = build(small_config(segment_size=3), dtype=torch.float64), tokens(2, 14)
    trained = [p.requires_grad_("q_proj" in n or "u_proj" in n) for n, p in model.named_parameters()]
    trained = [p for p in trained if p.requires_grad]
    cache = MCCache(config=model.config)
    decoded = torch.cat([model(token, cache=cache).logits for token in ids.split(1, 1)], 1)
    expected = torch.autograd.grad(model(ids).logits.square().sum(), trained)
    for actual, wanted in zip(torch.autograd.grad(decoded.square().sum(), trained), expected, strict=True):
        assert_close(actual, wanted, 1e-9)


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_gradient_accumulation(memory):
    """Rows of different lengths one by one, as the Trainer passes them, against one batch."""
    model = build(small_config(memory)).train()
    ids = tokens(3, 2 * SIZE + 3)
    labels = ids.clone()
    labels[0, 4:], labels[1, :9] = -100, -100
    items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(3):
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-5, name)


def trained(tmp_path, data, **arguments) -> tuple[list[float], torch.nn.Module]:
    model = build(small_config(segment_size=4, memory_chunk_size=2)).train()
    arguments = {"gradient_accumulation_steps": 1} | arguments
    options = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        seed=1,
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, options, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def test_trainer(tmp_path):
    """Four rows at once, one by one accumulated, and with checkpointing: the same losses and the same weights."""
    data = [{"input_ids": row, "labels": row} for row in tokens(12, 15)]
    losses, model = trained(tmp_path, data, per_device_train_batch_size=4)
    assert len(losses) == 3
    for arguments in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    ):
        others, other = trained(tmp_path, data, **arguments)
        assert others == pytest.approx(losses, rel=1e-3)  # the log rounds
        for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            assert_close(b, a, 1e-3, name)


@torch.no_grad()
def test_a_cache_is_used_while_nothing_is_checkpointed():
    """Text that is generated in the middle of training, without gradients, goes on from the cache."""
    model, ids, cache = build(small_config("swla")).train(), tokens(2, 2 * SIZE + 3), MCCache(small_config("swla"))
    expected = model(ids).logits
    model.gradient_checkpointing_enable()
    pieces = [model(piece, cache=cache).logits for piece in ids.split([SIZE + 1, 1, SIZE + 1], 1)]
    assert_close(torch.cat(pieces, 1), expected, 1e-5)


# ------------------------------------------------------------------------------------------------------------- dtypes
def state_dtypes(cache) -> set[torch.dtype]:
    kept = {name.split(".")[0]: tensor.dtype for name, tensor in cache.layers[0].tensors.items()}
    return {kept[name] for name in ("state", "kept", "sums", "summaries")}


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_bf16_autocast(memory):
    model = build(small_config(memory)).train()
    ids = tokens(2, 3 * SIZE + 3)
    expected, _ = loss_and_gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, ids)
        cache = model(ids, use_cache=True)[CACHE_NAME]
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    kept = {
        name: t.dtype for name, t in cache.layers[0].tensors.items() if name[:4] in ("stat", "kept", "sums", "summ")
    }
    assert len(kept) >= 4 and set(kept.values()) == {torch.float32}


@pytest.mark.parametrize("memory", ["linear", "dla", "gru"])
@torch.no_grad()
def test_memories_are_read_outside_of_autocast(memory, monkeypatch):
    """A prompt and the tokens after it: products of states are in fp32 for both."""
    model = build(small_config(memory, aggregation="residual"))
    kind, seen = type(model.model.layers[0].mixer.memory), []
    for name in ("read", "constant_read"):
        original = getattr(kind, name)
        recorded = lambda *args, f=original: (seen.append(torch.is_autocast_enabled("cpu")), f(*args))[1]  # noqa: E731
        monkeypatch.setattr(kind, name, recorded)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model(tokens(1, 2 * SIZE), use_cache=True)[CACHE_NAME]
        model(tokens(1, 1), cache=cache)
    assert len(seen) > 2 and not any(seen)


@pytest.mark.parametrize("memory", MEMORY_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(memory, dtype):
    """Near the fp32 model, with fp32 states, and decoding near the plain pass."""
    config, ids = small_config(memory), tokens(2, 3 * SIZE + 3)
    model, exact = build(config).to(dtype), build(config)
    with torch.no_grad():
        out, wanted = model(ids, use_cache=True), exact(ids)
        assert out.logits.dtype == dtype
        assert_close(out.logits.float(), wanted.logits, 0.3)
        assert (out.logits.float() - wanted.logits).abs().mean() < 0.05
        assert {t.dtype for n, t in out[CACHE_NAME].layers[0].tensors.items() if n[:4] == "kept"} == {torch.float32}
        cache = MCCache(config=config)
        steps = torch.cat([model(x, cache=cache).logits for x in ids.split(1, dim=1)], 1)
        assert (steps.float() - out.logits.float()).abs().mean() < 0.05


@pytest.mark.parametrize("memory", MEMORY_NAMES)
def test_padding_in_fp16(memory):
    """A token of padding has a key of zeros, whose norm must not be divided by a number that is zero in fp16."""
    ids = tokens(2, 3 * SIZE)
    mask = (torch.arange(3 * SIZE) < torch.tensor([[3 * SIZE], [SIZE]])).long()
    model = build(small_config(memory)).to(torch.float16).train()
    _, gradients = loss_and_gradients(model, ids, attention_mask=mask)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("fields", EACH + LOGARITHMIC, ids=name_of)
def test_prefill_in_inference_mode_then_go_on(fields):
    """The cache's tensors are inference tensors then: decoding, and training through what comes after, still work."""
    model = build(small_config(**fields))
    ids = tokens(1, 3 * SIZE)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for grad in (False, True):
        cache = MCCache(config=model.config)
        with torch.inference_mode():
            model(ids[:, : SIZE + 3], cache=cache)
        with torch.set_grad_enabled(grad):
            steps = [model(x, cache=cache).logits for x in ids[:, SIZE + 3 :].split([1] * 6 + [7], dim=1)]
        assert_close(torch.cat(steps, 1), expected[:, SIZE + 3 :])
        if grad:
            steps[-1].sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# -------------------------------------------------------------------------------------------------------- compilation
def compiled_step(model, ids, backend: str, **options):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # one graph, nothing read back to Python
    model.zero_grad()
    loss = compiled(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


COMPILED = family(aggregation=["grm"], state_init=["independent"], segmentation=["constant"])
COMPILED += [{"memory": "linear", "aggregation": "ssc"}, {"memory": "linear", "segmentation": "logarithmic"}]


@pytest.mark.parametrize("fields", COMPILED, ids=name_of)
def test_compiled_training_step(fields):
    model, ids = build(small_config(**fields)).train(), tokens(2, 2 * SIZE + 3)
    check(compiled_step(model, ids, "aot_eager"), loss_and_gradients(model, ids), 1e-5)


# one of every kind of write
@pytest.mark.parametrize("memory", ["gated_linear", "swla", "gated_delta", "rwkv7", "titans", "lstm"])
@torch.no_grad()
def test_compiled_for_every_length(memory):
    """A second length makes sizes symbolic; the third one needs no other graph."""
    torch._dynamo.reset()
    model, counter = build(small_config(memory)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (4 * SIZE + 5, 6 * SIZE + 5, 3 * SIZE + 5):
        ids = tokens(2, length)
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
def test_compiled_with_padding(aggregation):
    """With the decompositions and the partitioner of inductor, whose own code takes minutes to build."""
    model, ids = build(small_config("swla", aggregation=aggregation)).train(), tokens(2, 2 * SIZE + 3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    compiled = compiled_step(model, ids, "aot_eager_decomp_partition", attention_mask=mask)
    check(compiled, loss_and_gradients(model, ids, attention_mask=mask), 1e-5)


# ----------------------------------------------------------------------------------------------------- what is kept
class Kept:
    """Sizes of the distinct tensors that a forward keeps for its backward, parameters and inputs not counted."""

    def __init__(self, model, length: int) -> None:
        self.sizes: dict[int, int] = {}
        self.alive = []
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.alive.append(tensor)  # else its address would be given to another one
                self.sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = tokens(1, length)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids, labels=ids, use_cache=False)
        self.largest, self.total = max(self.sizes.values()), sum(self.sizes.values())


@pytest.mark.parametrize("fields", family(state_init=["independent"]), ids=name_of)
def test_activations_grow_with_the_tokens(fields):
    """Nothing of size L x N or L x L is kept: twice the tokens, twice the bytes (and one more level)."""
    model = build(small_config(**fields, segment_size=4)).train()
    short, long = Kept(model, 512), Kept(model, 1024)
    growth = 2.1 if fields["segmentation"] == "constant" else 2.5
    assert long.largest < growth * short.largest
    assert long.total < growth * short.total


@pytest.mark.parametrize("fields", family(segmentation=["constant"]), ids=name_of)
def test_no_state_per_token_is_kept(fields):
    """Nothing of size L x head_dim^2."""
    model = build(small_config(**fields, segment_size=16, num_attention_heads=1, head_dim=64)).train()
    assert Kept(model, 256).largest < 4 * 256 * 64 * 64 * 0.75


def test_the_growth_of_activations_is_measured(monkeypatch):
    """The first of the two tests sees a tensor of tokens x segments, be it as thin as one head's gates."""
    forward = MCDecoderLayer.forward

    def wasteful(self, hidden_states, *args, **kwargs):
        out = forward(self, hidden_states, *args, **kwargs)
        return out + 0 * (hidden_states @ hidden_states[:, ::4].mT).exp().sum()

    monkeypatch.setattr(MCDecoderLayer, "forward", wasteful)
    model = build(small_config(segment_size=4)).train()
    assert Kept(model, 1024).largest > 2.1 * Kept(model, 512).largest
    assert Kept(model, 1024).total > 2.1 * Kept(model, 512).total


def test_model_as_initialised_learns():
    """A few steps of AdamW on one batch, from the library's own initial weights."""
    torch.manual_seed(0)
    model = MCForCausalLM(small_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens(4, 3 * SIZE)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
