"""What an installation adds, and that importing the package depends on nothing optional and disturbs nobody."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]

PARTS = ("modeling_mc", "kernels", "conversion", "hub", "cli", "training", "serving")

# A stand-in for the PyPI package `kernels`, of a version that Transformers accepts and therefore imports from.
FAKE_KERNELS = '''
class Stub:
    """A class of any arguments and attributes."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return Stub()


def decorator(*args, **kwargs):
    return lambda decorated: decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "Mode":
        return Stub()
    return Stub if name[0].isupper() else decorator
'''


def python(code: str, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> str:
    """Runs code in a new interpreter started in `cwd`, with `path` in PYTHONPATH; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, so that the checkout stays free of build folders."""
    folder = tmp_path_factory.mktemp("copy") / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "outputs", "*.egg-info", "*.partial")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run = subprocess.run([*pip, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_one_top_level_module(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        archive.extractall(tmp_path)
    (info,) = {name.split("/")[0] for name in files} - {"mc_transformers"}
    assert info.startswith("mc_transformers-") and info.endswith(".dist-info")
    assert (tmp_path / info / "top_level.txt").read_text().split() == ["mc_transformers"]

    sources = [
        *ROOT.glob("*.py"),
        ROOT / "LICENSE",
        ROOT / "model_cards" / "template.md",
        *(ROOT / "model_cards" / "presets").glob("*.json"),
        *(file for folder in PARTS for file in (ROOT / folder).rglob("*.py")),
    ]
    wanted = {f"mc_transformers/{file.relative_to(ROOT).as_posix()}" for file in sources if file.name != "setup.py"}
    assert {name for name in files if not name.startswith(info)} == wanted

    # the unpacked wheel works from anywhere, presets included
    code = "import mc_transformers as mc; print(mc.__file__); print(mc.MCConfig.from_preset('mc-170m').hidden_size)"
    file, width = python(code, cwd=tmp_path, path=(tmp_path,)).split()
    assert Path(file) == tmp_path / "mc_transformers" / "__init__.py"
    assert int(width) == 768


def test_source_distribution_holds_what_a_wheel_is_built_from(source, wheel, tmp_path):
    python(f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=source)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        modules = {name.partition("/")[2] for name in archive.namelist() if name.startswith("mc_transformers/")}
    assert modules | {"setup.py", "pyproject.toml", "README.md"} <= files
    assert not [name for name in files if name.startswith(("tests", "examples", "docs"))]


def test_kernels_is_not_a_regular_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


IMPORT_BOTH = """
import transformers, mc_transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import import_utils
assert isinstance(AutoConfig.for_model("mc"), mc_transformers.MCConfig)
print(import_utils.is_kernels_available())
"""


def test_import_from_the_repository_root():
    python(IMPORT_BOTH)


def test_import_from_the_repository_root_with_the_pypi_package_kernels(tmp_path):
    package, info = tmp_path / "kernels", tmp_path / "kernels-0.18.2.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(FAKE_KERNELS)
    # the version has to be one that the installed Transformers wants, or it would not touch the package at all
    version = python("from transformers.utils import import_utils as u; print(u.KERNELS_MIN_VERSION)").strip()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "top_level.txt").write_text("kernels\n")
    assert python(IMPORT_BOTH, path=(tmp_path,)).split() == ["True"]


# Records who imports what: Transformers and torch may load optional packages on their own account.
RECORDED_IMPORT = """
import builtins, json, sys
sys.modules.update(dict.fromkeys({blocked}))
genuine, importers = builtins.__import__, set()

def recording(name, globals=None, *rest, **named):
    importers.add(((globals or {{}}).get("__name__") or "", name.split(".")[0]))
    return genuine(name, globals, *rest, **named)

builtins.__import__ = recording
import mc_transformers
from transformers import AutoModelForCausalLM, DynamicCache
import torch
config = mc_transformers.MCConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, head_dim=8, segment_size=4)
model = AutoModelForCausalLM.from_config(config).eval()
logits = model(torch.arange(10)[None], cache=DynamicCache(config=config)).logits
assert logits.isfinite().all()
print(json.dumps(sorted({{name for importer, name in importers if importer.startswith("mc_transformers")}})))
"""


def test_import_and_forward_without_optional_packages():
    blocked = ["triton", "peft", "matplotlib", "datasets", "fla"]
    python(RECORDED_IMPORT.format(blocked=blocked))


def test_import_and_cpu_forward_load_nothing_optional():
    imported = set(json.loads(python(RECORDED_IMPORT.format(blocked=[]))))
    assert "torch" in imported
    assert not imported & {"triton", "peft", "matplotlib", "datasets", "fla", "memory_caching"}
