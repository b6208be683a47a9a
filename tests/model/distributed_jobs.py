"""Runs under torchrun with gloo: every job compares what several ranks compute with what one process computes.

torchrun --standalone --nproc_per_node 2 tests/model/distributed_jobs.py context_parallel
"""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments


sys.path.insert(0, str(Path(__file__).parents[1]))  # started as a script: no pytest.ini says where helpers are

from helpers import assert_close, build, combinations, name_of, small_config, tokens
from mc_transformers import MCCache, MCForCausalLM
from mc_transformers.modeling_mc.context_parallel import context_parallel, shard_batch


SIZE = 4
SEGMENTS = {"segment_size": SIZE, "memory_chunk_size": 2, "num_hidden_layers": 2}


# -------------------------------------------------------------------------------------------------- context parallel
def shared_kinds() -> list[dict]:
    every = combinations(memory=["linear", "swla", "gated_delta", "titans", "lstm"], aggregation=["grm"])
    every += combinations(memory=["linear", "dla"], aggregation=["residual", "soup", "ssc", "mean"])
    every += [
        {"summaries_per_segment": 2, "segment_summary": "hidden"},
        {"segment_size": 1, "memory_chunk_size": 1},  # a rank holds fewer tokens than a convolution reaches
        {"max_cached_segments": 2},
        {"conv_kernel_size": 0, "gate_function": "sigmoid"},
    ]
    return every


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def exact_loss(logits: torch.Tensor, next_labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Transformers' own loss casts logits to fp32, which hides what differs below 1e-7."""
    return F.cross_entropy(logits.flatten(0, 1), next_labels.flatten(), reduction="sum") / count


def same_as_one_process(fields: dict, length: int) -> None:
    """Logits, loss and gradients of a padded batch that the ranks share."""
    model = build(small_config(**SEGMENTS | fields), dtype=torch.float64).train()
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    whole = model(ids, labels=labels, use_cache=False)
    part = shard_batch({"input_ids": ids, "labels": ids, "attention_mask": mask}, model.config)
    exact_loss(whole.logits[:, :-1], labels[:, 1:], part["num_items_in_batch"]).backward()
    expected = gradients(model)

    with context_parallel():
        mine = model(**part)
    # outside of the block, as the Trainer would
    exact_loss(mine.logits, part["shift_labels"], part["num_items_in_batch"]).backward()
    dist.all_reduce(loss := mine.loss.detach().clone())
    assert_close(loss, whole.loss.detach(), 1e-6, "loss")
    begin = dist.get_rank() * mine.logits.shape[1]
    known = whole.logits[:, begin : begin + mine.logits.shape[1]]
    assert_close(mine.logits[:, : known.shape[1]], known, 1e-12, "logits")
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        dist.all_reduce(gradient)
        assert_close(gradient, expected[name], 1e-11, name)


def context_parallel_equals_one_process() -> None:
    for fields in shared_kinds():
        size = fields.get("segment_size", SIZE)
        try:
            same_as_one_process(fields, 3 * size * dist.get_world_size() - size // 2)
        except AssertionError as error:
            raise AssertionError(f"{name_of(fields)}: {error}") from error


def context_parallel_with_checkpointing() -> None:
    """Recomputation happens in the backward pass, when the block has long been left."""
    model = build(small_config(**SEGMENTS)).train()
    part = shard_batch({"input_ids": tokens(1, 32), "labels": tokens(1, 32)}, model.config)
    with context_parallel():
        model(**part).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    with context_parallel():
        loss = model(**part).loss
    loss.backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], 1e-6, name)


def context_parallel_refuses() -> None:
    ids = tokens(1, 2 * SIZE)
    impossible = {
        "layer_types": {"layer_types": ["memory_caching", "full_attention"]},
        "aggregation": {"aggregation": "none"},
        "state_init": {"state_init": "checkpoint"},
        "segmentation": {"segmentation": "logarithmic"},
        "cache_eviction": {"max_cached_segments": 2, "cache_eviction": "least_read"},
        "mc_backend": {"mc_backend": "reference"},
    }
    for field, fields in impossible.items():
        model = build(small_config(**SEGMENTS | fields))
        with pytest.raises(ValueError, match=f"context_parallel: `{field}`"), context_parallel():
            model(ids, use_cache=False)
    model = build(small_config(**SEGMENTS))
    for name, value in {
        "use_cache": True,
        "attention_mask": torch.ones_like(ids),
        "cu_seq_lens": torch.tensor([0, 3, 8]),
    }.items():
        key = "cu_seq_lens_q" if name == "cu_seq_lens" else name
        with pytest.raises(ValueError, match=f"context_parallel: `{name}`"), context_parallel():
            model(ids, **{"use_cache": False, key: value})
    with pytest.raises(ValueError, match="7 tokens on this rank"), context_parallel():
        model(tokens(1, 7), use_cache=False)
    with pytest.raises(ValueError, match="padding before a token"):
        shard_batch({"input_ids": ids, "attention_mask": torch.tensor([[0] + [1] * 7])}, model.config)
    with pytest.raises(ValueError, match="position_ids"):
        shard_batch({"input_ids": ids, "position_ids": ids}, model.config)


# --------------------------------------------------------------------------------- tensors, stages, shards of a model
KINDS = {
    "linear": {},
    "gated_delta-ssc": {"memory": "gated_delta", "aggregation": "ssc"},
    "rwkv7": {"memory": "rwkv7"},
    "titans-soup": {"memory": "titans", "aggregation": "soup", "gate_source": "query"},
    "lstm-residual": {"memory": "lstm", "aggregation": "residual"},
    "hybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["memory_caching", "full_attention", "memory_caching", "sliding_attention"],
        "sliding_window": 5,
        "num_key_value_heads": 1,
    },
    "tied": {"tie_word_embeddings": True},
}
# what else a layer has per head, or shares between heads; and what keeps heads together
HEADS = KINDS | {
    "mamba2": {
        "memory": "gated_linear",
        "gate_form": "step",
        "value_skip": True,
        "output_norm": "gated",
        "num_memory_heads": 4,
        "num_key_heads": 2,
        "conv_bias": True,
        "qkv_bias": True,
        "state_init": "checkpoint",
    },
    "swla-logarithmic": {"memory": "swla", "segmentation": "logarithmic", "online_gate_bias": 2.0, "rope": "all"},
    "dla-added": {"memory": "dla", "cached_answers": "added", "summaries_per_segment": 2, "conv_kernel_size": 0},
    "uneven": {"num_memory_heads": 3, "segment_summary": "position"},
}
WHOLE = {"lstm-residual": "'lstm' mixes heads", "uneven": "not divisible by 2"}
GREEDY = {"do_sample": False, "max_new_tokens": 14}


@contextmanager
def saved(fields: dict) -> Iterator[tuple[torch.nn.Module, str]]:
    """A wild model, and the folder where all ranks find it."""
    fields = SEGMENTS | {"vocab_size": 62} | fields  # even: 5.16 splits no odd vocabulary
    model = build(small_config(**fields), dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        yield model, shared[0]
        dist.barrier()


def each_kind(check, kinds: dict[str, dict] = KINDS) -> None:
    for kind, fields in kinds.items():
        try:
            with saved(fields) as (model, folder):
                check(model, folder)
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_generation(model, other) -> None:
    """A padded batch, decoded past the border of a segment."""
    ids = tokens(2, 2 * SIZE + 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(other.generate(ids, attention_mask=mask, **GREEDY), expected)


def check_gradients(model, other, ids: torch.Tensor) -> None:
    losses = [one.train()(ids, labels=ids, use_cache=False).loss for one in (model, other)]
    assert_close(losses[1].detach(), losses[0].detach(), 1e-6, "loss")
    for loss in losses:
        loss.backward()
    expected = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert_close(whole(parameter.grad), expected[name].grad, 1e-5, f"gradient of {name}")


def memory_bytes(cache) -> int:
    """Of all that has heads."""
    layers = [layer.tensors.items() for layer in cache.memory_layers]
    return sum(x.nbytes for tensors in layers for name, x in tensors if name != "position")


def tensor_parallel(model, folder: str) -> None:
    """Weights, states, gates and cache of half of the heads on each rank, and what one process computes."""
    from transformers.distributed import DistributedConfig

    why = next((why for kind, why in WHOLE.items() if HEADS[kind].items() <= model.config.to_dict().items()), None)
    with said() as messages:
        config = DistributedConfig(tp_size=2)
        other = MCForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config).eval()
    assert [why in message for message in messages] == ([] if why is None else [True])
    split = {name for name, p in other.named_parameters() if isinstance(p, DTensor) and p.to_local().shape != p.shape}
    assert {name.rsplit(".", 2)[1] for name in split} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}
    ids = tokens(2, 3 * SIZE + 1)
    mine, whole = (MCCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        found, expected = (m(ids, cache=c, output_attentions=True) for m, c in ((other, mine), (model, whole)))
    assert_close(found.logits, expected.logits, 1e-10, "logits")
    for layer, (gates, known) in enumerate(zip(found.attentions, expected.attentions, strict=True)):
        if hasattr(model.model.layers[layer], "mixer"):
            assert_close(gates, known, 1e-10, f"gates of layer {layer}")
    assert memory_bytes(mine) * (1 if why else 2) == memory_bytes(whole)
    if why is None:
        with pytest.raises(ValueError, match="filled by another model .*heads="):
            other(ids, cache=whole)
    with pytest.raises(ValueError, match="split over several processes"):
        mine.save_pretrained(folder)
    check_generation(model, other)
    check_gradients(model, other, ids)


@contextmanager
def said() -> Iterator[list[str]]:
    """What is logged of the heads of memory layers."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("mc_transformers.modeling_mc.tensor_parallel")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def tensor_parallel_equals_one_process() -> None:
    each_kind(tensor_parallel, HEADS)


def pipeline(model, folder: str) -> None:
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(pp_size=2)
    other = MCForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config).eval()
    stages = [type(layer).__name__ for layer in other.model.layers]
    assert stages.count("PipelineIdentityLayer") == len(stages) // 2
    ids = tokens(2, 3 * SIZE + 1)
    with torch.no_grad():
        assert_close(other(ids).logits, model(ids).logits, 1e-10, "logits")
    check_generation(model, other)


def pipeline_equals_one_process() -> None:
    each_kind(pipeline)


def sharded(model, folder: str) -> None:
    """Transformers' own FSDP2: every rank trains on its own rows, the gradients are those of all rows."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=2)
    other = MCForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config).eval()
    assert all(isinstance(p, DTensor) for p in other.parameters())
    rank, ids = dist.get_rank(), tokens(4, 3 * SIZE + 1)
    mine = ids[2 * rank : 2 * rank + 2]
    with torch.no_grad():
        assert_close(other(mine).logits, model(mine).logits, 1e-10, "logits")
    check_generation(model, other)
    model.train()(ids, labels=ids).loss.backward()
    other.train()(mine, labels=mine).loss.backward()
    expected = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert_close(whole(parameter.grad), expected[name].grad, 1e-5, f"gradient of {name}")


def sharding_equals_one_process() -> None:
    each_kind(sharded)


def sharding_in_half_precision() -> None:
    """Decays and M_0 stay in fp32, in groups of their own: FSDP2 wants one dtype per group."""
    from transformers.distributed import DistributedConfig

    for kind in ("gated_delta-ssc", "rwkv7", "titans-soup"):
        with saved(KINDS[kind]) as (model, folder):
            config = DistributedConfig(fsdp_size=2)
            other = MCForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=config).train()
            kept = {name for name, p in other.named_parameters() if p.dtype == torch.float32}
            assert kept and all(name.endswith(".bias") for name in kept)
            ids = tokens(2, 3 * SIZE + 1)
            loss = other(ids, labels=ids).loss
            loss.backward()
            assert abs(loss.item() - model(ids, labels=ids).loss.item()) < 0.05
            assert all(whole(p.grad).isfinite().all() for p in other.parameters())


def trained(model, folder: str, batch_size: int) -> tuple[list[float], torch.nn.Module]:
    args = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        logging_steps=1,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        weight_decay=0.1,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 3 * SIZE + 1)]
    run = Trainer(model, args, train_dataset=data)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], run.model


def trainer_on_a_sharded_model() -> None:
    """The Trainer on FSDP2 shards: the same losses and weights as on one process with the same batches."""
    from transformers.distributed import DistributedConfig

    with saved(KINDS["titans-soup"]) as (_, folder):
        config = DistributedConfig(fsdp_size=2)
        model = MCForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config)
        losses, model = trained(model, folder, 2)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        found = {name: whole(p.detach()) for name, p in model.named_parameters()}
        torch.save({"losses": losses, "weights": found}, f"{folder}/sharded{dist.get_rank()}.pt")
        dist.barrier()
        if dist.get_rank() == 0:  # a process of its own, which no other rank is part of
            alone = [sys.executable, __file__, "alone", folder]
            environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
            done = subprocess.run(alone, env=environment, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr[-3000:]
        dist.barrier()


def trainer_alone(folder: str) -> None:
    model = MCForCausalLM.from_pretrained(folder, dtype=torch.float64)
    losses, model = trained(model, folder, 4)
    sharded = torch.load(f"{folder}/sharded0.pt")
    assert len(losses) == 4 and sharded["losses"] == pytest.approx(losses, rel=1e-3)
    start = dict(MCForCausalLM.from_pretrained(folder, dtype=torch.float64).named_parameters())
    for name, parameter in model.named_parameters():
        moved, other = parameter.detach() - start[name].detach(), sharded["weights"][name] - start[name].detach()
        assert_close(other, moved, 1e-3, name)


LAUNCHED = (  # what torchrun tells its processes
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

JOBS = {
    "context_parallel": (
        context_parallel_equals_one_process,
        context_parallel_with_checkpointing,
        context_parallel_refuses,
    )
}


def main(name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in JOBS[name] if name in JOBS else [globals()[name]]:
        job()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed: {job.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    trainer_alone(sys.argv[2]) if sys.argv[1] == "alone" else main(sys.argv[1])
