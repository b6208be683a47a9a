"""Hook of MkDocs: puts the package where the API reference looks for it.

The repository root is the package, under whatever name it was cloned, and it also holds tests, virtual environments
and builds. So the modules alone are copied to build/docs/mc_transformers before a build.
"""

import shutil
from pathlib import Path

from mkdocs.plugins import event_priority


ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "docs" / "mc_transformers"
PARTS = ("__init__.py", "configuration_mc.py", "modeling_mc", "kernels", "conversion", "hub", "cli", "training")


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config):
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, TARGET / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, TARGET / part)
    return config
