"""The entry point, without vLLM: it never raises, and leaves versions alone that it does not know."""

import sys
import types
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from mc_transformers.serving.vllm import is_supported, register


@pytest.fixture
def fake(monkeypatch):
    """A vLLM of any version, with a registry that remembers."""

    def install(version, registered):
        package, about = types.ModuleType("vllm"), types.ModuleType("vllm.version")
        package.ModelRegistry = types.SimpleNamespace(register_model=registered)
        about.__version__ = version
        monkeypatch.setitem(sys.modules, "vllm", package)
        monkeypatch.setitem(sys.modules, "vllm.version", about)

    return install


def test_a_known_version(fake):
    found = []
    fake("0.32.1+cpu", lambda *names: found.append(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
        register()
    assert found == 2 * [("MCForCausalLM", "mc_transformers.serving.vllm.model:MCForCausalLM")]
    module = found[0][1].partition(":")[0].removeprefix("mc_transformers.").replace(".", "/")
    assert (Path(__file__).parents[2] / f"{module}.py").exists()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev", None])
def test_an_unknown_version_is_left_alone(fake, version):
    fake(version, lambda *names: pytest.fail("registered"))
    with pytest.warns(UserWarning, match="mc-transformers: the (plugin has not been run with|vLLM plugin is off)"):
        register()


def test_an_error_is_a_warning(fake):
    def fail(*names):
        raise RuntimeError("changed")

    fake("0.32.0", fail)
    with pytest.warns(UserWarning, match=r"the vLLM plugin is off \(RuntimeError: changed\)"):
        register()


def test_versions():
    assert is_supported("0.32.0") and is_supported("0.32.4rc1+cpu")
    assert not any(map(is_supported, ("0.3.2", "0.33", "1.32.0", "")))


def test_installed_under_its_entry_point():
    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "mc_transformers"]
    assert all(entry.value == "mc_transformers.serving.vllm:register" for entry in found)
    setup = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    assert '"vllm.general_plugins": ["mc_transformers = mc_transformers.serving.vllm:register"]' in setup
