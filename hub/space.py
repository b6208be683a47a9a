# Copyright 2026 the mc-transformers authors.
"""A folder that is a Hub Space: a page that shows a model's memory, and the model."""

import json
from pathlib import Path

from .bundle import bundle, has_tokenizer
from .files import new_folder, write_file
from .flat import ROOT


PAGE = ROOT / "serving" / "page.py"
README = """---
title: {title}
emoji: 🧠
sdk: gradio
app_file: app.py
---

A page that shows the memory of `{name}`: read a long text once, ask, and see which of its segments the answer was read
from. The model lies in `model/`; `python app.py` starts the page on a machine of your own.
"""
REQUIREMENTS = "torch>=2.9\ntransformers>=5.16,<6\naccelerate\nsafetensors\ngradio>=5\n"


def space(
    checkpoint: str,
    output: str | Path,
    repo_id: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    **options: object,
) -> Path:
    """Write a Space: `app.py`, `requirements.txt`, `README.md` and, in `model/`, a bundle, which needs no package.

    Args:
        as of `bundle`, which also takes the options.

    Raises:
        ValueError: the checkpoint has no tokenizer. The others as of `bundle`.
    """
    output = Path(output)
    name = repo_id or output.name
    if not has_tokenizer(checkpoint, revision):
        raise ValueError(f"{checkpoint} has no tokenizer, and the page of a Space takes text")
    with new_folder(output, overwrite, checkpoint) as folder:
        bundle(checkpoint, folder / "model", name, revision, **options)
        write_file(folder / "app.py", PAGE.read_text("utf-8"))
        write_file(folder / "requirements.txt", REQUIREMENTS)
        write_file(folder / "README.md", README.format(title=json.dumps(f"The memory of {name}"), name=name))
    return output
