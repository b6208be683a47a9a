"""What the small experiments share: a model from a few options, a training loop, and the record of a run as JSON."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from mc_transformers import MCCache, MCConfig, MCForCausalLM
from mc_transformers.hub.card import Metadata, Result, render, write_card
from mc_transformers.hub.files import new_folder, write_file
from mc_transformers.modeling_mc.mixer import MCMixer
from mc_transformers.training import ReadSchedule


def option(default, text: str):
    """A dataclass field that HfArgumentParser explains."""
    return field(default=default, metadata={"help": text})


@dataclass
class ExperimentConfig:
    """Model and training of one run. The defaults are the published setting of MQAR, made small."""

    memory: str = option("linear", "write rule of the memory")
    aggregation: str = option("grm", "read rule; 'none' is the recurrent model without caching")
    segment_size: int = option(16, "tokens per segment")
    k: int = option(2, "past segments that 'ssc' reads per token")
    dense_part: float = option(0.0, "part of the steps in which 'ssc' comes down from all segments to k")
    state_init: str = option("independent", "'independent' or 'checkpoint'")
    layer_types: list[str] = field(
        default_factory=lambda: ["memory_caching"],
        metadata={"help": "type of each layer, or one for all: memory_caching, full_attention, sliding_attention"},
    )
    layers: int = option(2, "number of layers")
    width: int = option(32, "hidden size")
    heads: int = option(1, "heads per layer")
    mlp_width: int = option(0, "hidden size of the MLP, 0 for none as in the published setting")
    output_gate: bool = option(False, "gate the mixer's output; learning starts later with it")
    conv_kernel_size: int = option(4, "width of the short convolution on queries, keys and values, 0 for none")
    options: str = option("{}", "other fields of MCConfig as JSON")
    init_std: float = option(0.1, "standard deviation of initial weights; the usual 0.02 is meant for wide models")

    steps: int = option(1500, "training steps")
    batch: int = option(32, "sequences per step")
    lr: float = option(5e-3, "peak learning rate of AdamW")
    schedule: str = option("constant_with_warmup", "learning rate schedule, a name of Transformers")
    warmup: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.01, "weight decay of matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "seed of weights and training data")
    eval_every: int = option(100, "steps between evaluations")
    device: str = option("cpu", "torch device")
    threads: int | None = option(None, "CPU threads, torch's choice if not given")
    save: str | None = option(None, "folder to write the trained model and its card to")


@dataclass
class OutputConfig:
    """Where the results of a run go."""

    output: str | None = option(None, "path of the results without extension, else outputs/ and the program's name")

    def path(self, name: str) -> Path:
        """The JSON file of the results of the program `name`, in a folder that exists."""
        path = Path(self.output or f"outputs/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(path.name + ".json")


def build_model(config: ExperimentConfig, vocab_size: int, max_length: int) -> PreTrainedModel:
    """The model of a run, freshly initialised from `config.seed`."""
    set_seed(config.seed)
    types = config.layer_types * config.layers if len(config.layer_types) == 1 else config.layer_types
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": max_length,
        "layer_types": types,
        "memory": config.memory,
        "aggregation": config.aggregation,
        "segment_size": config.segment_size,
        "num_selected_segments": config.k,
        "state_init": config.state_init,
        "conv_kernel_size": config.conv_kernel_size,
        "use_output_gate": config.output_gate,
        "initializer_range": config.init_std,
        "use_cache": False,
    }
    return MCForCausalLM(MCConfig(**fields | json.loads(config.options))).to(config.device)


def query_logits(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits where there is a label, [labels != -100, vocab]: the head is expensive, and most tokens may have none."""
    return _logits_and_border_loss(model, input_ids, labels)[0]


def _logits_and_border_loss(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `query_logits`; and the rate loss of borders that content chooses, if it does."""
    out = model.base_model(input_ids=input_ids, use_cache=False)
    return model.get_output_embeddings()(out.last_hidden_state[labels != -100]), out.border_loss


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """Bytes that the model keeps of one sequence `[1, T]`: states, summaries, convolution, or keys and values."""
    cache = MCCache(config=model.config)
    model(input_ids=input_ids, cache=cache, use_cache=True)
    return cache.nbytes


def train(
    config: ExperimentConfig,
    model: PreTrainedModel,
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    evaluate: Callable[[], dict[str, float]],
    progress: bool = True,
) -> dict:
    """Trains on fresh batches with AdamW.

    Args:
        draw: the next input_ids and labels [B, T]; a label stands at the token that has to predict it, -100 elsewhere.
        evaluate: numbers for the curve, at every `eval_every` steps and at the end.

    Returns:
        a record for JSON: configuration, curve, time, parameters, bytes of the cache after one training sequence,
        versions.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
    )
    scheduler = get_scheduler(config.schedule, optimizer, config.warmup, config.steps)
    curve, start, mean_loss, since = [], time.perf_counter(), 0.0, 0
    schedule, mixers = None, [module for module in model.modules() if isinstance(module, MCMixer)]
    bar = tqdm(range(1, config.steps + 1), desc=f"{config.memory}/{config.aggregation}", disable=not progress)
    for step in bar:
        input_ids, labels = (x.to(config.device) for x in draw())
        if config.dense_part:
            schedule = schedule or ReadSchedule(input_ids.shape[1] // config.segment_size, config.dense_part)
            for mixer in mixers:
                mixer.aggregation.top_k = schedule.selected(step - 1, config.steps, config.k)
        logits, border_loss = _logits_and_border_loss(model, input_ids, labels)
        loss = F.cross_entropy(logits.float(), labels[labels != -100])
        if border_loss is not None:
            loss = loss + model.config.border_loss_weight * border_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        mean_loss, since = mean_loss + loss.detach(), since + 1  # stays on the device: no wait for it at every step
        if step % config.eval_every == 0 or step == config.steps:
            model.eval()
            point = {"step": step, "train_loss": float(mean_loss) / since, **evaluate()}
            model.train()
            curve.append(point)
            bar.set_postfix({key: f"{value:.3f}" for key, value in point.items() if key != "step"})
            mean_loss, since = 0.0, 0
    seconds = round(time.perf_counter() - start, 1)
    model.eval()
    return {
        "config": dataclasses.asdict(config),
        "curve": curve,
        "seconds": seconds,
        "parameters": model.num_parameters(),
        "cache_bytes": cache_bytes(model, input_ids[:1]),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def save_checkpoint(
    config: ExperimentConfig, model: PreTrainedModel, results: list[Result], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Model, card, results and settings, to `config.save`; the folder is whole or not there."""
    folder = Path(config.save)
    for settings in (model.config, model.generation_config):
        settings.use_cache, settings.pad_token_id = True, 0  # in every task
        if tokenizer is not None:
            settings.bos_token_id, settings.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with new_folder(folder, overwrite=True) as partial:
        model.save_pretrained(partial, with_code=False)  # a folder of the package
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        entries = [dataclasses.asdict(result) for result in results]
        save_json({"results": entries, "settings": dataclasses.asdict(config)}, partial / "results.json")
        card = render(
            model.config,
            folder.as_posix(),
            has_tokenizer=tokenizer is not None,
            parameters=model.num_parameters(),
            metadata=Metadata(license="apache-2.0"),
            results=results,
            has_code=False,
        )
        write_card(partial, card, results)


def save_json(record: dict, path: Path) -> None:
    """Writes under another name first: a file of the final name is always whole."""
    write_file(path, json.dumps(record, indent=2) + "\n")
