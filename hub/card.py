# Copyright 2026 the mc-transformers authors.
"""Model cards: filled from the config, and with results only from the JSON files that evaluations have written."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..configuration_mc import LAYER_TYPE, MCConfig
from .facts import architecture, human_bytes, lengths, skeleton
from .files import write_file
from .flat import ROOT


TEMPLATE = ROOT / "model_cards" / "template.md"
READS = {
    "mean": "It reads the average of all segments' memories.",
    "residual": "It reads the sum of all segments' memories (eq. 7 of the paper).",
    "grm": "It reads all segments' memories through gates that depend on content (eq. 9 of the paper).",
    "soup": "It reads one memory mixed from all segments' memories by content (eq. 15 of the paper).",
    "ssc": "It reads the segments' memories that match the token best (eq. 17 of the paper).",
}


@dataclass
class Metadata:
    """What the config cannot know; every field may be left out."""

    license: str | None = None
    language: list[str] | None = None
    base_model: str | None = None
    datasets: list[str] | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Result:
    """One evaluation number, as the "results" list of a JSON file holds it.

    Attributes:
        metric, value, dataset: what was measured, on what. unit, settings: in words.
        dataset_id, task_id: of a benchmark that the Hub knows; with both, the number also goes to `.eval_results/`.
    """

    metric: str
    value: float
    dataset: str
    unit: str = ""
    settings: str = ""
    dataset_id: str | None = None
    task_id: str | None = None


def read_results(path: str | Path) -> list[Result]:
    """Results of one JSON file.

    Raises:
        ValueError: the file is not JSON, or holds no list "results" of entries with metric, value and dataset.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        results = [Result(**entry) for entry in entries]
        if any(not isinstance(result.value, (int, float)) for result in results):
            raise TypeError("a value is not a number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of `mc-transformers eval --output` ({error})") from error
    return results


def _markdown(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _evaluation(results: Sequence[Result]) -> str:
    if not results:
        return "No result is recorded for this checkpoint."
    rows = [(r.dataset, r.metric, f"{r.value:.4g} {r.unit}".strip(), r.settings) for r in results]
    return _markdown(rows, ("data", "metric", "value", "settings"))


def _tokens(config: MCConfig) -> str:
    """Tokens per segment."""
    if config.segmentation == "content":
        return f"{config.least_segment_size} to {config.segment_size}"
    return str(config.segment_size)


def _summary(config: MCConfig) -> str:
    layers, family = config.num_hidden_layers, "[Memory Caching](https://arxiv.org/abs/2602.24281)"
    others = layers - config.layer_types.count(LAYER_TYPE)
    if others == layers:
        return f"A Transformer in the form of the {family} family: all of its {layers} layers are attention layers."
    hybrid = f" {others} of its {layers} layers are attention layers." if others else ""
    network = f"a recurrent network with `{config.memory}` memories that keeps"
    if config.aggregation == "none":
        return f"A {family} language model: {network} one running state and no cache of segments.{hybrid}"
    return (
        f"A {family} language model: {network} the state of its memory after every segment of {_tokens(config)} "
        f"tokens. {READS[config.aggregation]}{hybrid}"
    )


def _limit(config: MCConfig) -> str | None:
    """What is lost, and how the cache grows; None where no layer has a memory."""
    if LAYER_TYPE not in config.layer_types:
        return None
    if config.aggregation == "none":
        return "All that was read is compressed into one state of fixed size: details can be lost."
    growth = f"The cache grows by one memory per {_tokens(config)} tokens."
    if config.segmentation == "logarithmic":
        growth = "What is far back is only there in coarse form: the cache grows when the length doubles."
    elif config.max_cached_segments is not None:
        growth = f"Not more than {config.max_cached_segments} segments are kept."
    return (
        "A segment is compressed into a memory of fixed size: details of a segment can be lost, and the more so the "
        f"longer the segment. {growth}"
    )


def _usage(repo_id: str, auto_class: str, has_tokenizer: bool, has_code: bool) -> str:
    trust, plugin = (", trust_remote_code=True", []) if has_code else ("", ["import mc_transformers"])
    load = f'model = {auto_class}.from_pretrained("{repo_id}"{trust})'
    if auto_class != "AutoModelForCausalLM" or not has_tokenizer:
        return "\n".join([*plugin, f"from transformers import {auto_class}", "", load])
    return "\n".join(
        [
            *plugin,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{trust})',
            load,
            'inputs = tokenizer("Memory caching", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        ]
    )


def render(
    config: MCConfig,
    repo_id: str,
    auto_class: str = "AutoModelForCausalLM",
    has_tokenizer: bool = True,
    parameters: int | None = None,
    metadata: Metadata | None = None,
    results: Sequence[Result] = (),
    figure: str | None = None,
    has_code: bool = True,
) -> ModelCard:
    """The card of a model of `config` that will be found under `repo_id`; `figure` is a file beside it.

    Without `has_code` the folder is a plain checkpoint that needs the package.
    """
    metadata, model = metadata or Metadata(), skeleton(config)
    data = asdict(metadata)
    data["tags"] = ["memory-caching", config.memory, *metadata.tags]
    if auto_class == "AutoModelForCausalLM":
        data["pipeline_tag"] = "text-generation"
    fields = {"parameters": f"{parameters or model.num_parameters():,}", **architecture(config)}
    sizes = [(name, human_bytes(ours), human_bytes(keys)) for name, ours, keys in lengths(config, model)]
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", **data),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=repo_id.split("/")[-1],
        summary=_summary(config),
        usage=_usage(repo_id, auto_class, has_tokenizer, has_code),
        has_code=has_code,
        architecture=_markdown([(f"`{k}`", v) for k, v in fields.items()], ("field", "value")),
        figure=figure,
        lengths=_markdown(sizes, ("tokens", "this model's cache", "keys and values")),
        evaluation=_evaluation(results),
        limit=_limit(config),
        max_length=config.max_position_embeddings,
    )


def write_card(folder: str | Path, card: ModelCard, results: Sequence[Result] = ()) -> None:
    """Write README.md, and the results of benchmarks that the Hub knows to `.eval_results/`."""
    write_file(Path(folder) / "README.md", str(card))
    known = [r for r in results if r.dataset_id and r.task_id]
    for dataset_id in sorted({r.dataset_id for r in known}):
        entries = [
            EvalResultEntry(dataset_id, r.task_id, r.value, notes=", ".join(filter(None, [r.metric, r.settings])))
            for r in known
            if r.dataset_id == dataset_id
        ]
        target = Path(folder) / ".eval_results" / f"{dataset_id.replace('/', '--')}.yaml"
        target.parent.mkdir(exist_ok=True)
        write_file(target, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
