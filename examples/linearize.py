"""A trained Transformer becomes a hybrid: half of its attention layers turn into memory layers and learn their work.

    python examples/linearize.py                      # about 2 minutes of CPU time; --help lists the options

    llama      trains a byte-level Llama on Python's own documentation: the model to convert
    distil     `mc-transformers distil`: the layers that cost least become memory layers; they start in closed form,
               learn to answer what their attention layers answered, and at last, all together, the Llama's logits

OUTPUT gets the Llama and the hybrid, whose distil.json holds every number. After an interruption the same command goes
on behind the last step that was finished. With a model of your own it is one call: docs/converting.md.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, get_scheduler, set_seed
from transformers.hf_argparser import HfArg

import mc_transformers as mc
from mc_transformers.conversion.distil.options import Options
from mc_transformers.conversion.distil.run import distil
from mc_transformers.hub.files import new_folder


@dataclass
class LinearizeConfig:
    """Everything adjustable. Every field is a command-line option."""

    output: str = HfArg(default="outputs/linearize", help="folder of the models")
    memory: str = HfArg(default="gated_delta", help="write rule of the new layers")
    aggregation: str = HfArg(default="grm", help="read rule of the new layers")
    segment_size: int = HfArg(default=64, help="tokens per segment")
    hidden_size: int = HfArg(default=128, help="width of the Llama")
    layers: int = HfArg(default=4, help="its layers; half of them are converted")
    heads: int = HfArg(default=4, help="its heads")
    block: int = HfArg(default=256, help="tokens per sequence")
    batch: int = HfArg(default=8, help="sequences per step")
    eval_blocks: int = HfArg(default=40, help="held-out sequences that a loss is measured on, at most")
    steps: int = HfArg(default=250, help="steps of training the Llama")
    lr: float = HfArg(default=3e-3, help="their peak learning rate")
    match_steps: int = HfArg(default=100, help="steps of matching the attention layers' answers")
    end_steps: int = HfArg(default=50, help="steps of learning the Llama's logits")
    seed: int = HfArg(default=0, help="seed of weights and of the order of data")


def write_texts(folder: Path) -> None:
    """What `help()` shows of Python's language reference, a file per topic, in `train` and `held_out`.

    A checksum of a topic's name decides, so that it stays on its side in every version of Python. Long topics repeat
    short ones word for word (`compound` contains `if`): paragraphs of a held-out topic are cut out of training.
    """
    sides = {name: zlib.crc32(name.encode()) % 10 == 0 for name in sorted(topics)}  # True: held out
    seen = {tuple(p.split()) for name, out in sides.items() if out for p in topics[name].split("\n\n")}
    for name, out in sides.items():
        kept = [p for p in topics[name].split("\n\n") if out or tuple(p.split()) not in seen]
        file = folder / ("held_out" if out else "train") / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n\n".join(kept), encoding="utf-8")


def train_llama(texts: Path, folder: Path, config: LinearizeConfig) -> None:
    """A byte-level Llama, saved with its tokenizer."""
    tokenizer = mc.byte_tokenizer(4 * config.block)
    texts = [path.read_text(encoding="utf-8") for path in sorted(texts.glob("*.txt"))]
    ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
    data = torch.tensor(ids).unfold(0, config.block, config.block)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=4 * config.block,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(llama.parameters(), lr=config.lr, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, config.steps // 10, config.steps)
    bar = tqdm(range(config.steps), desc="llama")
    for _ in bar:
        batch = data[torch.randint(len(data), (config.batch,))]
        loss = llama(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with new_folder(folder) as new:
        llama.save_pretrained(new)
        tokenizer.save_pretrained(new)


def linearize(config: LinearizeConfig) -> dict:
    """Both steps; returns the record of the second."""
    set_seed(config.seed)
    output = Path(config.output)
    if not (output / "text").exists():
        with new_folder(output / "text") as folder:
            write_texts(folder)
    if not (output / "llama").exists():
        train_llama(output / "text" / "train", output / "llama", config)
    return distil(
        Options(
            teacher=str(output / "llama"),
            output=str(output / "hybrid"),
            text=(str(output / "text" / "train"),),
            held_out=(str(output / "text" / "held_out"),),
            layers=f"auto:{config.layers // 2}",
            memory=config.memory,
            aggregation=config.aggregation,
            segment_size=config.segment_size,
            length=config.block,
            batch=config.batch,
            eval_windows=config.eval_blocks,
            minutes=None,
            match_steps=config.match_steps,
            end_steps=config.end_steps,
            end_lr=1e-3,
            seed=config.seed,
        )
    )


def main() -> None:
    (config,) = HfArgumentParser(LinearizeConfig).parse_args_into_dataclasses()
    record = linearize(config)
    print(f"\nheld-out loss, nats per byte (layers {record['layers']} of {config.layers} are memory layers)")
    for name in ("teacher", "start", "matched", "final"):
        print(f"  {name:<10} {record[f'held_out_{name}']['loss']:.3f}")
    print(f"{sum(record['seconds'].values()):.0f} s of distilling; models and numbers are in {config.output}")


if __name__ == "__main__":
    main()
