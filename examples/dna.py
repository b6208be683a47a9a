"""Predict the next nucleotide of a genome: no caching, gates over all segments, the best few, and attention.

    python examples/dna.py --get
    python examples/dna.py --seed 1 --steps 600 --models none grm
    python examples/dna.py --genome human_chromosome.fna.gz --length 4096

`--get` fetches Debian's package bowtie-examples (6 MB, Artistic License 2.0) and unpacks it into outputs/dna. It holds
the complete genome of Escherichia coli 536 (NC_008253, 4.9 million nucleotides). Later runs find it there. A genome of
your own is a FASTA file, gzipped or not.

One stretch in twenty is held out. All models have as many parameters, and see the same stretches. The loss is in bits
per nucleotide, where guessing costs 2; a Markov chain over the last few nucleotides says what counting alone gives.
"""

import argparse
import gzip
import json
import math
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import set_seed

import mc_transformers as mc


PACKAGE, LICENCE = "bowtie-examples", "Artistic License 2.0"
GENOME = Path("outputs/dna/NC_008253.fna.gz")
LETTERS = b"ACGT"
MODELS = {
    "none": {"aggregation": "none"},
    "grm": {"aggregation": "grm"},
    "ssc": {"aggregation": "ssc", "num_selected_segments": 2},
    "attention": {"layer_types": ["full_attention"] * 2},
}
EVERY = 20  # one stretch in so many is held out


def get() -> None:
    """Debian's package, whose file of the genome goes to `GENOME`.

    Raises:
        RuntimeError: no apt-get or dpkg here, or no such package.
    """
    print(f"fetching {PACKAGE}, {LICENCE}; its file `copyright` has the text of the licence")
    GENOME.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=GENOME.parent) as folder:
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{PACKAGE} could not be fetched ({error}): give a FASTA file as --genome") from error
        os.replace(next(Path(folder).rglob("copyright")), GENOME.with_name("copyright"))
        os.replace(next(Path(folder).rglob(GENOME.name)), GENOME)


def read_genome(path: Path) -> torch.Tensor:
    """int64 `[n]`, nucleotides 0 to 3 in their order; other letters, which stand for unknown ones, are left out.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no nucleotides.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: fetch it with --get ({PACKAGE}, {LICENCE}), or give --genome")
    raw = path.read_bytes()
    text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    lines = [line for line in text.upper().split(b"\n") if not line.startswith(b">")]
    codes = torch.full((256,), -1)
    codes[torch.tensor(list(LETTERS))] = torch.arange(4)
    found = codes[torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8).long()]
    if not (found >= 0).any():
        raise ValueError(f"{path} holds no nucleotides, allowed: a FASTA file of A, C, G and T")
    return found[found >= 0]


def stretches(genome: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out stretches `[n, length]`; one in twenty, evenly spaced, is held out.

    Raises:
        ValueError: fewer than twenty stretches.
    """
    cut = genome[: len(genome) // length * length].view(-1, length)
    if len(cut) < EVERY:
        raise ValueError(f"`length`={length} leaves {len(cut)} stretches of the genome, allowed: {EVERY} or more")
    held_out = torch.arange(len(cut)) % EVERY == EVERY // 2
    return cut[~held_out], cut[held_out]


def markov(train: torch.Tensor, held_out: torch.Tensor, order: int) -> float:
    """Bits per nucleotide of a chain that counted the training stretches, with one more of everything."""

    def coded(x: torch.Tensor) -> torch.Tensor:  # the last `order` nucleotides and the next one as a number
        return (x.unfold(1, order + 1, 1) * 4 ** torch.arange(order, -1, -1)).sum(-1)

    counts = torch.bincount(coded(train).flatten(), minlength=4 ** (order + 1)).view(-1, 4).double() + 1
    return -(counts / counts.sum(1, keepdim=True)).log2().flatten()[coded(held_out)].mean().item()


def build(name: str, options: argparse.Namespace) -> mc.MCForCausalLM:
    """A model with, within one percent, as many parameters as the model without caching."""
    fields = {
        "vocab_size": 4,
        "hidden_size": options.width,
        "num_hidden_layers": 2,
        "num_attention_heads": options.width // 32,
        "memory": options.memory,
        "segment_size": options.segment_size,
        "tie_word_embeddings": False,
    }

    def make(name: str, mlp: int) -> mc.MCForCausalLM:
        return mc.MCForCausalLM(mc.MCConfig(**fields | {"intermediate_size": mlp} | MODELS[name]))

    with torch.device("meta"):
        wanted = make("none", 2 * options.width).num_parameters()
        base, step = make(name, 1).num_parameters(), make(name, 2).num_parameters()
    return make(name, max(1, 1 + round((wanted - base) / (step - base))))


def train(model: mc.MCForCausalLM, data: torch.Tensor, options: argparse.Namespace, name: str) -> None:
    """AdamW with a cosine schedule over random stretches, the same for all models of a seed."""
    order = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1, betas=(0.9, 0.95))
    warmup = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / options.steps))
    )
    bar = tqdm(range(options.steps), desc=name, unit="step")
    for _ in bar:
        batch = data[torch.randint(len(data), (options.batch,), generator=order)]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(bits=f"{loss.item() / math.log(2):.3f}", refresh=False)


@torch.inference_mode()
def bits(model: mc.MCForCausalLM, held_out: torch.Tensor) -> torch.Tensor:
    """Mean loss in bits of every position of the held-out stretches but the first, `[length - 1]`."""
    total = torch.zeros(held_out.shape[1] - 1, dtype=torch.float64)
    for batch in held_out.split(8):
        logits = model(batch, use_cache=False).logits[:, :-1].transpose(1, 2)
        total += F.cross_entropy(logits, batch[:, 1:], reduction="none").double().sum(0)
    return total / len(held_out) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--get", action="store_true", help=f"fetch {PACKAGE} ({LICENCE}) first, if it is not there")
    parser.add_argument("--genome", type=Path, default=GENOME, help="a FASTA file, gzipped or not")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--memory", default="gated_delta", help="write rule of the memory layers")
    parser.add_argument("--width", type=int, default=64, help="of the models, two layers with heads of 32")
    parser.add_argument("--segment_size", type=int, default=64, help="nucleotides per segment")
    parser.add_argument("--length", type=int, default=1024, help="nucleotides per stretch")
    parser.add_argument("--batch", type=int, default=4, help="stretches per step")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--most_held_out", type=int, default=64, help="held-out stretches that are read")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the stretches")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/dna/results.jsonl"), help="a line per model is added"
    )
    options = parser.parse_args()
    if options.get and not GENOME.exists():
        get()
    data, held_out = stretches(read_genome(options.genome), options.length)
    held_out = held_out[:: max(1, len(held_out) // options.most_held_out)][: options.most_held_out]
    print(f"{data.numel():,} nucleotides to train on, {held_out.numel():,} held out, of {options.genome}")
    chains = {order: markov(data, held_out, order) for order in (2, 5, 8)}
    print("Markov chains: " + ", ".join(f"order {order} {value:.4f} bits" for order, value in chains.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        set_seed(options.seed)
        model, begin = build(name, options), time.time()
        train(model.train(), data, options, name)
        by_position = bits(model.eval(), held_out)
        record = {
            "cell": name,
            "seed": options.seed,
            "bits": by_position.mean().item(),
            "bits_last_half": by_position[options.length // 2 :].mean().item(),
            "parameters": model.num_parameters(),
            "seconds": round(time.time() - begin, 1),
            "markov_bits": {str(order): value for order, value in chains.items()},
            "settings": {key: value for key, value in vars(options).items() if isinstance(value, int | float | str)},
        }
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{name:<10} {record['bits']:.4f} bits per nucleotide, {record['bits_last_half']:.4f} in the last half of "
            f"a stretch, {record['parameters']:,} parameters, {record['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
