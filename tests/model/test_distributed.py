"""Several processes on gloo compute what one process computes; jobs and checks are in distributed_jobs.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from helpers import build, small_config, tokens
from mc_transformers import MCCache, MCForCausalLM
from mc_transformers.modeling_mc.segments import SegmentTable


FOLDER = Path(__file__).parent
GROUPS = pytest.mark.skipif(
    not hasattr(MCForCausalLM, "_resolve_parallel_plans"),
    reason="this version of Transformers makes no FSDP2 groups by dtype, and its Trainer takes no sharded model",
)
JOBS = [
    ("context_parallel", 2),
    ("context_parallel", 4),
    ("tensor_parallel_equals_one_process", 2),
    ("pipeline_equals_one_process", 2),
    ("sharding_equals_one_process", 2),
    *(pytest.param(job, 2, marks=GROUPS) for job in ("sharding_in_half_precision", "trainer_on_a_sharded_model")),
]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("job, ranks", JOBS)
def test_ranks_equal_one_process(job, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(FOLDER / "distributed_jobs.py"), job]
    done = subprocess.run(command, env=environment, cwd=FOLDER, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "passed: " in done.stdout


# ------------------------------------------------------------------------------------------ layers on several devices
def test_a_table_moves_with_the_layers():
    """One copy per device, of every tensor."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    table = SegmentTable.build(2, 11, 4, torch.device("cpu"), mask, torch.tensor([3, 5]))
    moved = table.to("meta")
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert table.to("meta") is moved and table.to("cpu") is table


def test_the_cache_stays_on_each_layers_device():
    """What device_map="auto" does: a hook per layer moves its inputs. The second device here is "meta"."""
    model = build(small_config(num_hidden_layers=2))
    model.model.layers[1].to("meta")
    model.model.norm.to("meta")
    model.lm_head.to("meta")
    skip = model._skip_keys_device_placement
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta", skip_keys=skip))
    cache, ids = MCCache(config=model.config), tokens(2, 19)
    with torch.no_grad():
        for start, stop in ((0, 17), (17, 18), (18, 19)):
            assert model(ids[:, start:stop], cache=cache).logits.device.type == "meta"
    for layer, device in zip(cache.layers, ("cpu", "meta"), strict=True):
        assert {tensor.device.type for tensor in layer.tensors.values()} == {device}
