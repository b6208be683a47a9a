# Copyright 2026 the mc-transformers authors.
"""Flat, self-contained folders that load with `trust_remote_code=True` where this package is not installed."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_mc.registration import AUTO_CLASSES
from .card import Metadata, Result, render, write_card
from .figure import draw_memory
from .files import new_folder, scratch, write_file
from .flat import ROOT, flat_files, unreachable
from .loading import load_model, load_tokenizer


@cache
def code_files() -> dict[str, str]:
    """The flat code files, made and checked once per process.

    Raises:
        ValueError: Transformers would not load one of the files.
    """
    files = flat_files()
    with scratch() as folder:
        for name, source in files.items():
            write_file(folder / name, source)
        if lost := unreachable(files, folder):
            raise ValueError(f"Transformers would not copy {', '.join(sorted(lost))}: nothing imports them")
    return files


def write_code(folder: str | Path) -> None:
    """Write the flat code files and their licence."""
    for name, source in code_files().items():
        write_file(Path(folder) / name, source)
    write_file(Path(folder) / "LICENSE", (ROOT / "LICENSE").read_bytes())


def write_bundle(
    model: PreTrainedModel,
    folder: str | Path,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
    metadata: Metadata | None = None,
    results: Sequence[Result] = (),
) -> None:
    """Write everything that a repository of the model needs: weights, configs, tokenizer, code, card, licence."""
    model.save_pretrained(folder, max_shard_size=max_shard_size, with_code=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    kind = (AUTO_CLASSES[type(model).__name__], tokenizer is not None, model.num_parameters())
    card = render(model.config, repo_id, *kind, metadata, results, draw_memory(model.config, folder))
    write_card(folder, card, results)


def bundle(
    checkpoint: str,
    output: str | Path,
    repo_id: str | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
    metadata: Metadata | None = None,
    results: Sequence[Result] = (),
) -> Path:
    """Bundle a checkpoint of this family. The folder appears when it is complete and, unless `verify` is off, has been
    loaded in a process of its own without this package and gave the same logits.

    Args:
        checkpoint: folder or Hub name, at `revision`. output: folder to write, which is returned.
        repo_id: name that the card gives; by default that of the folder. max_shard_size: largest file of weights.
        overwrite: replace a folder that is there. metadata, results: for the card.

    Raises:
        ValueError, OSError: the checkpoint does not load, or would be replaced.
        FileExistsError: there is such an output already.
        RuntimeError: the bundle does not load on its own, or differs.
    """
    output = Path(output)
    with new_folder(output, overwrite, checkpoint) as folder:
        model = load_model(checkpoint, revision=revision)
        tokenizer = load_tokenizer(checkpoint, revision) if has_tokenizer(checkpoint, revision) else None
        write_bundle(model, folder, repo_id or output.name, tokenizer, max_shard_size, metadata, results)
        if verify:
            verify_bundle(folder, model)
    return output


def has_tokenizer(checkpoint: str, revision: str | None = None) -> bool:
    """Whether a checkpoint comes with a tokenizer; a broken one counts, so that it is not dropped in silence."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        checkpoint, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return found is not None


# -------------------------------------------------------------------------------------------------------- verification
# run where this package cannot be imported: the folder has to bring all it needs
_CHECK = """
import json, sys
sys.modules["mc_transformers"] = None
import torch, transformers
from safetensors.torch import load_file
folder, auto_class, expected = sys.argv[1:]
expected = load_file(expected)
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
with torch.no_grad():
    output = model(expected["input_ids"])[0]
    same = [torch.equal(output, expected["output"])]
    if "generated" in expected:
        ids = expected["input_ids"]
        new = expected["generated"].shape[1] - ids.shape[1]
        same.append(torch.equal(model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False),
                                expected["generated"]))
print(json.dumps({"module": type(model).__module__, "same": same}))
"""


@torch.no_grad()
def _expected(model: PreTrainedModel, num_new: int = 4) -> dict[str, torch.Tensor]:
    """What the bundle must reproduce on the CPU: logits (over more than two short segments) and tokens."""
    config = model.config
    length = min(2 * config.segment_size + 3, 512)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    record = {"input_ids": ids, "output": model(ids)[0]}
    if model.can_generate():
        record["generated"] = model.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)
    return record


def verify_bundle(folder: str | Path, model: PreTrainedModel) -> None:
    """Load `folder` in a new process that cannot import this package, and compare with `model` on the CPU, bit by bit.

    Raises:
        RuntimeError: it does not load, or differs.
    """
    with scratch() as temporary:
        # Transformers names the code's module after the folder: give it a plain name
        place = temporary / "bundle"
        place.symlink_to(Path(folder).resolve(), target_is_directory=True)
        save_file(_expected(model.cpu()), temporary / "expected.safetensors")
        environment = os.environ | {  # as many threads: their number changes the order of sums, and so the last bits
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "HF_MODULES_CACHE": str(temporary / "modules"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        auto_class = AUTO_CLASSES[type(model).__name__]
        run = subprocess.run(
            [sys.executable, "-c", _CHECK, str(place), auto_class, f"{temporary}/expected.safetensors"],
            cwd=temporary,
            env=environment,
            capture_output=True,
            text=True,
        )
    if run.returncode:
        raise RuntimeError(f"the bundle does not load on its own: {run.stderr.strip().splitlines()[-1]}")
    report = json.loads(run.stdout.splitlines()[-1])
    if not report["module"].startswith("transformers_modules."):
        raise RuntimeError(f"the bundle was loaded with other code than its own ({report['module']})")
    if not all(report["same"]):
        raise RuntimeError("the bundle loads, but does not compute what the checkpoint computes")
