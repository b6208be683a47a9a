"""Hook of MkDocs: puts the package where the API reference looks for it.

The repository root is the package, under whatever name it was cloned, and it also holds tests, virtual environments
and builds. So the modules alone are copied to build/docs/mc_transformers before a build.
"""

import shutil
from pathlib import Path

from mkdocs.plugins import event_priority


ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "docs" / "mc_transformers"
FOLDERS = ("modeling_mc", "kernels", "conversion", "hub", "cli", "training")


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config):
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, TARGET / file.name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, TARGET / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return config
