"""Packaging: the repository root itself is the import package `mc_transformers`.

The packages are listed by hand: discovery would find `kernels`, `tests` and `conversion` as top-level modules, and an
installed top-level `kernels` breaks `import transformers`, which looks for a PyPI package of that name.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


TRAIN = ["peft", "datasets", "matplotlib"]
GGUF = ["gguf>=0.17"]
SFT = ["trl>=1", *TRAIN]
SERVE = ["transformers[serving]"]
UI = ["gradio>=5"]
ONNX = ["onnx>=1.21", "onnxscript>=0.7", "onnxruntime>=1.21"]
EXPORT = ["torch>=2.11", "transformers>=5.24,<6", *ONNX]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", "ruff"]
TEST = [
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
    "ruff",
    "import-linter>=2.15",
    "setuptools>=77",
    *GGUF,
    *ONNX,
    *SFT,
]


class BuildPy(build_py):
    """Leaves out this file, which lies in the folder of the package but is not one of its modules."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


setup(
    name="mc-transformers",
    version="0.1.0",
    description="Memory Caching: recurrent language models with growing memory, as a Hugging Face Transformers plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    cmdclass={"build_py": BuildPy},
    package_dir={"mc_transformers": "."},
    packages=[
        "mc_transformers",
        "mc_transformers.modeling_mc",
        "mc_transformers.modeling_mc.memories",
        "mc_transformers.kernels.write",
        "mc_transformers.kernels.read",
        "mc_transformers.kernels.step",
        "mc_transformers.kernels.shared",
        "mc_transformers.conversion",
        "mc_transformers.conversion.sources",
        "mc_transformers.conversion.distil",
        "mc_transformers.conversion.export",
        "mc_transformers.hub",
        "mc_transformers.training",
        "mc_transformers.cli",
        "mc_transformers.serving",
        "mc_transformers.serving.vllm",
    ],
    package_data={"mc_transformers": ["LICENSE", "model_cards/template.md", "model_cards/presets/*.json"]},
    entry_points={
        "console_scripts": ["mc-transformers = mc_transformers.cli.main:main"],
        "vllm.general_plugins": ["mc_transformers = mc_transformers.serving.vllm:register"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5.16,<6",
        "accelerate",
        "safetensors",
        "huggingface-hub",
        'triton; platform_system=="Linux"',
    ],
    extras_require={
        "train": TRAIN,
        "gguf": GGUF,
        "sft": SFT,
        "serve": SERVE,
        "ui": UI,
        "export": EXPORT,
        "test": TEST,
        "docs": DOCS,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
