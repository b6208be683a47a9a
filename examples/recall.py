"""Multi-query associative recall (MQAR): how many key-value pairs can a memory hold?

A sequence starts with D pairs `k1 v1 k2 v2 ...`; later every key comes up once more, and the model has to answer with
its value there. Trains a small model from scratch on fresh sequences, and writes the accuracy on a fixed test set as
JSON and PNG:

    python examples/recall.py --memory linear --aggregation grm --pairs 32 --steps 1500
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, get_scheduler, set_seed

from mc_transformers import MCConfig, MCForCausalLM


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class RecallConfig:
    """One run of the task: the model, the data and the training. Every field is a command-line option."""

    memory: str = _option("linear", "write rule of the memory")
    aggregation: str = _option("grm", "read rule; 'none' is the recurrent model without caching")
    segment_size: int = _option(16, "tokens per segment")
    k: int = _option(2, "past segments that 'ssc' reads per token")
    state_init: str = _option("independent", "'independent' or 'checkpoint'")
    layer_types: list[str] = field(
        default_factory=lambda: ["memory_caching"],
        metadata={"help": "type of each layer, or one for all: memory_caching, full_attention, sliding_attention"},
    )
    layers: int = _option(2, "number of layers")
    width: int = _option(32, "hidden size")
    heads: int = _option(1, "heads per layer")
    mlp_width: int = _option(0, "hidden size of the MLP, 0 for none as in the published setting")
    output_gate: bool = _option(False, "gate the mixer's output; learning starts later with it")
    conv_kernel_size: int = _option(4, "width of the short convolution on queries, keys and values, 0 for none")
    options: str = _option("{}", "other fields of MCConfig as JSON")
    init_std: float = _option(0.1, "standard deviation of initial weights; the usual 0.02 is meant for wide models")

    seq_len: int = _option(256, "tokens per sequence, T")
    pairs: int = _option(32, "key-value pairs per sequence, D")
    vocab: int = _option(512, "vocabulary: keys come from its lower, values from its upper half")
    power_a: float = _option(0.01, "exponent of the gaps between pairs and queries: slot i has weight i^(a-1)")
    random_non_queries: bool = _option(True, "fill the positions between queries with random tokens instead of zeros")

    steps: int = _option(1500, "training steps")
    batch: int = _option(32, "sequences per step")
    lr: float = _option(5e-3, "peak learning rate of AdamW")
    schedule: str = _option("constant_with_warmup", "learning rate schedule, a name of Transformers")
    warmup: int = _option(100, "steps of linear warm-up")
    weight_decay: float = _option(0.01, "weight decay of matrices")
    clip: float = _option(1.0, "largest norm of the gradient")
    seed: int = _option(0, "seed of weights and training data")
    test_size: int = _option(512, "sequences in the test set")
    test_seed: int = _option(1_000_003, "seed of the test set, the same for every run")
    eval_every: int = _option(100, "steps between evaluations")
    device: str = _option("cpu", "torch device")
    threads: int | None = _option(None, "CPU threads, torch's choice if not given")


def mqar_batch(
    batch_size: int,
    seq_len: int,
    num_pairs: int,
    vocab_size: int,
    *,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    num_passes: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of the MQAR task of Arora et al. (2024), all of a batch at once.

    Keys are distinct ids of 1..V/2-1, values distinct ids of V/2..V-1. The pairs fill the first 2·D positions (or
    `num_passes` times as many, to show them more often); the rest is cut into two-token slots. Every key is asked for
    at the first position of a slot of its own; slots are drawn without replacement with weights i^(a-1), i = 1, 2, ...

    Returns:
        input_ids [batch_size, seq_len] and labels [batch_size, seq_len], both int64. The label stands **at** the query
        and is the value, -100 elsewhere: it is not shifted, as the value never follows in the input.
    """
    context = 2 * num_pairs * num_passes
    num_slots = (seq_len - context) // 2
    num_keys = vocab_size // 2 - 1
    if seq_len % 2 or vocab_size % 2:
        raise ValueError(f"seq_len and vocab_size must be even, not {seq_len} and {vocab_size}")
    if not 1 <= num_pairs <= num_slots:
        raise ValueError(f"num_pairs={num_pairs} does not fit: seq_len={seq_len} leaves {num_slots} slots for queries")
    if num_pairs > num_keys:
        raise ValueError(f"num_pairs={num_pairs} is more than the {num_keys} keys of vocab_size={vocab_size}")

    def draw(num_items: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """num_pairs of 0..num_items-1 per row, without replacement, in the order of drawing (Gumbel top-k): [B, D]."""
        uniform = torch.rand(batch_size, num_items, generator=generator, dtype=torch.float64)
        scores = -(-uniform.clamp_min(1e-300).log()).log()
        if weights is not None:
            scores = scores + weights.log()
        return scores.topk(num_pairs, dim=1).indices

    keys = 1 + draw(num_keys)
    values = vocab_size // 2 + draw(vocab_size // 2)
    slots = draw(num_slots, torch.arange(1, num_slots + 1, dtype=torch.float64) ** (power_a - 1))
    queries = context + 2 * slots

    fill = torch.zeros(batch_size, seq_len, dtype=torch.long)
    if random_non_queries:
        fill.random_(0, vocab_size, generator=generator)
    input_ids = fill.scatter(1, queries, keys)
    input_ids[:, :context] = torch.stack([keys, values], dim=2).flatten(1).repeat(1, num_passes)
    labels = torch.full_like(input_ids, -100).scatter(1, queries, values)
    return input_ids, labels


def build_model(config: RecallConfig) -> PreTrainedModel:
    """The model of a run, freshly initialised."""
    types = config.layer_types * config.layers if len(config.layer_types) == 1 else config.layer_types
    return MCForCausalLM(
        MCConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            head_dim=config.width // config.heads,
            max_position_embeddings=config.seq_len,
            layer_types=types,
            memory=config.memory,
            aggregation=config.aggregation,
            segment_size=config.segment_size,
            num_selected_segments=config.k,
            state_init=config.state_init,
            conv_kernel_size=config.conv_kernel_size,
            use_output_gate=config.output_gate,
            initializer_range=config.init_std,
            tie_word_embeddings=False,
            use_cache=False,
            **json.loads(config.options),
        )
    )


def query_logits(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits at the queries only, [B·D, vocab]: the other positions have no label, and a large vocabulary is dear."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[labels != -100])


@torch.no_grad()
def accuracy(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, batch_size: int = 64) -> float:
    """Share of all queries answered with their value."""
    model.eval()
    correct = 0
    for ids, targets in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True):
        correct += (query_logits(model, ids, targets).argmax(-1) == targets[targets != -100]).sum().item()
    model.train()
    return correct / (labels != -100).sum().item()


def train_recall(config: RecallConfig, progress: bool = True) -> dict:
    """Trains one model; returns a record for JSON: configuration, accuracy curve and final value, time, versions."""
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    device = torch.device(config.device)
    data = (config.seq_len, config.pairs, config.vocab)
    style = {"power_a": config.power_a, "random_non_queries": config.random_non_queries}
    test_generator = torch.Generator().manual_seed(config.test_seed)
    test = [x.to(device) for x in mqar_batch(config.test_size, *data, **style, generator=test_generator)]

    model = build_model(config).to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
    )
    scheduler = get_scheduler(config.schedule, optimizer, config.warmup, config.steps)

    train_generator = torch.Generator().manual_seed(config.seed)
    curve, start, mean_loss = [], time.perf_counter(), 0.0
    bar = tqdm(range(1, config.steps + 1), desc=f"{config.memory}/{config.aggregation}", disable=not progress)
    for step in bar:
        input_ids, labels = (x.to(device) for x in mqar_batch(config.batch, *data, **style, generator=train_generator))
        loss = F.cross_entropy(query_logits(model, input_ids, labels).float(), labels[labels != -100])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        mean_loss += loss.detach() / config.eval_every  # stays on the device: no wait for it at every step
        if step % config.eval_every == 0 or step == config.steps:
            curve.append({"step": step, "train_loss": float(mean_loss), "accuracy": accuracy(model, *test)})
            bar.set_postfix(loss=f"{float(mean_loss):.3f}", accuracy=f"{curve[-1]['accuracy']:.3f}")
            mean_loss = 0.0
    return {
        "task": "mqar",
        "config": dataclasses.asdict(config),
        "accuracy": curve[-1]["accuracy"],
        "curve": curve,
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def save_json(record: dict, path: Path) -> None:
    """Writes under another name first: a file of the final name is always whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_plot(record: dict, path: Path) -> bool:
    """Accuracy against training steps as a PNG. Without matplotlib nothing is written, and False returned."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    config = record["config"]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([p["step"] for p in record["curve"]], [p["accuracy"] for p in record["curve"]], marker=".")
    axes.set(xlabel="training step", ylabel="accuracy over all queries", ylim=(0, 1.02))
    pairs = f"{config['pairs']} pairs in {config['seq_len']} tokens"
    axes.set_title(f"{config['memory']}, {config['aggregation']}: {pairs}")
    axes.grid(alpha=0.3)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)
    os.replace(partial, path)
    return True


@dataclass
class OutputConfig:
    """Where the results of a run go."""

    output: str = _option("outputs/recall/run", "path of the results without extension: .json and .png are added")


def main() -> None:
    config, out = HfArgumentParser((RecallConfig, OutputConfig)).parse_args_into_dataclasses()
    path = Path(out.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": shlex.join(["python", *sys.argv])} | train_recall(config)
    json_path, png_path = (path.with_name(path.name + suffix) for suffix in (".json", ".png"))
    save_json(record, json_path)
    drawn = save_plot(record, png_path)
    print(f"accuracy {record['accuracy']:.3f} after {config.steps} steps, {record['seconds']} s")
    print(f"written: {json_path}", png_path if drawn else "(no plot: matplotlib is not installed)")


if __name__ == "__main__":
    main()
