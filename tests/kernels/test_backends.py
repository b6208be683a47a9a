"""What concerns the Triton kernels of all ops: when they are chosen, refused, imported and warmed up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mc_transformers as mc
from helpers import build, small_config, tokens, with_triton
from mc_transformers import MCConfig
from mc_transformers.kernels.shared.ops import choose_backend, triton_interpreted


@pytest.fixture
def compiler(monkeypatch):
    """As in a process where Triton compiles, which no kernel notices that is not launched."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_uninitialised_memory_is_poisoned():
    """In the tests of this folder: see `conftest.py`."""
    x = torch.zeros(3)
    for empty in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))):
        assert empty.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()


def test_triton_that_cannot_be_had_is_an_error(compiler):
    x = torch.zeros(1)
    assert choose_backend("auto", "op", x, 64) == choose_backend("torch", "op", x, 64) == "torch"
    with pytest.raises(ValueError, match="'triton' is not possible for `op`: Triton has no device 'cpu'"):
        choose_backend("triton", "op", x, 64)
    with pytest.raises(ValueError, match="mc_backend"):
        MCConfig(memory="gru", mc_backend="triton")
    with pytest.raises(ValueError, match="not possible for `linear_write`"):
        build(small_config("linear", mc_backend="triton"))(tokens(1, 4))


@with_triton
def test_triton_is_chosen_or_refused():
    x = torch.zeros(1)
    assert choose_backend("auto", "op", x, 64) == "torch"
    assert choose_backend("triton", "op", x, 64) == "triton"
    for wrong, width, reason in ((x.double(), 64, "dtype is torch.float64"), (x, 257, "257 wide, allowed: up to 256")):
        with pytest.raises(ValueError, match=reason):
            choose_backend("triton", "op", wrong, width)


def test_nothing_to_warm_up(caplog, compiler):
    for backend in ("auto", "torch"):
        assert mc.warmup(build(small_config("linear", mc_backend=backend))) == []
        assert f"linear grm on cpu runs torch (`mc_backend`='{backend}'): nothing to compile" in caplog.text
    assert mc.warmup(build(small_config("gru", vector_read="add"))) == []  # which has no queries
    with pytest.raises(ValueError, match="`model`=Linear has no memory layers"):
        mc.warmup(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not possible for `warmup`"):
        mc.warmup(build(small_config("linear", mc_backend="triton")))


def test_importing_the_package_does_not_import_the_kernels():
    code = (
        "import sys, mc_transformers as mc; mc.MCForCausalLM; "
        "print([m for m in sys.modules if m.startswith('mc_transformers.kernels') and 'triton' in m])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(not triton_interpreted(), reason="this is that process")
def test_in_a_process_where_triton_compiles():
    """The rest of the suite has it in its interpreter."""
    files = [Path(__file__).with_name(name) for name in ("test_offline_compile.py", "test_delta_write.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "offline or fla_is", *files]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " failed" not in run.stdout
