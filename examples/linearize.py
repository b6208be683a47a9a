"""A trained Transformer becomes a hybrid: half of its attention layers turn into memory layers and learn their work.

    python examples/linearize.py                      # about 4 minutes on a CPU; --help lists the options

    llama      trains a byte-level Llama on Python's own documentation: the model to convert
    convert    `mc-transformers convert --layers`: weights of attention are kept, gates and decay rates are new
    match      every memory layer reads what its attention layer read, and learns to answer what that answered
    lora       an adapter on all projections learns from the text itself, as after any conversion

Only `match` trains the memory layers, and only them: that is cheap, because no layer waits for another.
The folder gets the Llama, the matched model, the adapter for it, and every number as JSON.
"""

import json
import os
import platform
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_scheduler, set_seed
from transformers.hf_argparser import HfArg

import mc_transformers as mc
from mc_transformers.conversion.convert import convert
from mc_transformers.hub.files import new_folder, write_file


@dataclass
class LinearizeConfig:
    """Everything adjustable. Every field is a command-line option."""

    output: str = HfArg(default="outputs/linearize", help="folder of the models and of result.json")
    memory: str = HfArg(default="gated_delta", help="write rule of the new layers")
    aggregation: str = HfArg(default="grm", help="read rule of the new layers")
    segment_size: int = HfArg(default=64, help="tokens per segment")
    hidden_size: int = HfArg(default=128, help="width of the Llama")
    layers: int = HfArg(default=4, help="its layers; every second one is converted")
    heads: int = HfArg(default=4, help="its heads")
    block: int = HfArg(default=256, help="tokens per sequence")
    batch: int = HfArg(default=8, help="sequences per step")
    eval_blocks: int = HfArg(default=100, help="held-out sequences that a loss is measured on, at most")
    steps: int = HfArg(default=500, help="steps of training the Llama")
    lr: float = HfArg(default=3e-3, help="their peak learning rate")
    match_steps: int = HfArg(default=200, help="steps of matching the attention layers' answers")
    match_lr: float = HfArg(default=1e-2, help="their peak learning rate")
    lora_steps: int = HfArg(default=150, help="steps of training the adapter")
    lora_lr: float = HfArg(default=5e-3, help="their peak learning rate")
    lora_rank: int = HfArg(default=8, help="rank of the adapter")
    seed: int = HfArg(default=0, help="seed of weights and of the order of data")


# ---------------------------------------------------------------------------------------------------------------- text
def reference_texts() -> tuple[list[str], list[str]]:
    """What `help()` shows of Python's language reference, as (training documents, held-out documents), split by topic.

    A checksum of a topic's name decides, so that it stays on its side in every version of Python. Long topics repeat
    short ones word for word (`compound` contains `if`): paragraphs of a held-out topic are cut out of training.
    """
    sides = {name: zlib.crc32(name.encode()) % 10 == 0 for name in sorted(topics)}  # True: held out
    held_out = [topics[name] for name, out in sides.items() if out]
    seen = {tuple(p.split()) for text in held_out for p in text.split("\n\n")}
    train = [topics[name].split("\n\n") for name, out in sides.items() if not out]
    return ["\n\n".join(p for p in text if tuple(p.split()) not in seen) for text in train], held_out


def blocks(texts: list[str], tokenizer, length: int) -> torch.Tensor:
    """Documents joined by the end-of-text token and cut: ids [blocks, length]."""
    ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids).unfold(0, length, length)


# ------------------------------------------------------------------------------------------------------------ training
def optimize(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable,
    data: torch.Tensor,
    steps: int,
    lr: float,
    batch: int,
) -> float:
    """Minimises `loss_of(ids)`, ids `[batch, block]`; AdamW, cosine schedule with warm-up. Returns the seconds."""
    parameters, start = list(parameters), time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scheduler = get_scheduler("cosine", optimizer, steps // 10, steps)
    bar = tqdm(range(steps), desc=name)
    for _ in bar:
        loss = loss_of(data[torch.randint(len(data), (batch,))])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return time.perf_counter() - start


@torch.no_grad()
def held_out_loss(model: nn.Module, data: torch.Tensor, config: LinearizeConfig) -> float:
    """Nats per byte of the held-out sequences."""
    losses, data = [], data[: config.eval_blocks]
    for ids in tqdm(data.split(config.batch), desc="held out", leave=False):
        losses.append(model.eval()(input_ids=ids, labels=ids).loss * len(ids))
    model.train()
    return (sum(losses) / len(data)).item()


def train_on_text(name: str, model: nn.Module, data: torch.Tensor, steps: int, lr: float, batch: int) -> float:
    """Next-byte prediction with the parameters that are to be trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return optimize(name, trained, lambda ids: model(input_ids=ids, labels=ids).loss, data, steps, lr, batch)


# ------------------------------------------------------------------------------------------------------------ matching
class Recorder:
    """The hidden states `[batch, block, hidden]` in front of some decoder layers and behind them."""

    def __init__(self, model: PreTrainedModel, numbers: list[int]) -> None:
        self.before, self.after, self.fed = {}, {}, None
        for number in numbers:
            layer = model.model.layers[number]
            layer.register_forward_pre_hook(lambda layer, args, i=number: self._enter(i, args))
            layer.register_forward_hook(lambda layer, args, output, i=number: self.after.__setitem__(i, output))

    def _enter(self, number: int, args: tuple) -> tuple:
        """Notes what the layer reads, or has it read what `fed` holds."""
        self.before[number] = args[0] if self.fed is None else self.fed[number]
        return (self.before[number], *args[1:])


def matching_loss(teacher: PreTrainedModel, student: PreTrainedModel, numbers: list[int]) -> Callable:
    """Loss of ids: per layer, the squared error of what it adds to the residual stream, relative to the teacher's."""
    theirs, ours = Recorder(teacher, numbers), Recorder(student, numbers)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher.model(ids, use_cache=False)
        ours.fed = theirs.before  # each layer stands alone: errors of the layers below do not reach it
        student.model(ids, use_cache=False)
        errors = []
        for i in numbers:
            added = theirs.after[i] - theirs.before[i]
            errors.append((ours.after[i] - theirs.after[i]).square().sum() / added.square().sum())
        return torch.stack(errors).mean()

    return loss_of


def match(teacher: PreTrainedModel, folder: Path, data: torch.Tensor, config: LinearizeConfig) -> tuple:
    """The converted model of `folder` with memory layers that do the teacher's attention's work; and the seconds."""
    student = mc.MCForCausalLM.from_pretrained(folder)
    numbers = converted_layers(config)
    new = [p for i in numbers for p in student.model.layers[i].mixer.parameters()]
    loss_of = matching_loss(teacher, student.train(), numbers)
    seconds = optimize("match", new, loss_of, data, config.match_steps, config.match_lr, config.batch)
    with new_folder(folder.with_name("matched"), overwrite=True) as target:
        student.save_pretrained(target)
    return mc.MCForCausalLM.from_pretrained(folder.with_name("matched")), seconds


# ------------------------------------------------------------------------------------------------------------ the run
def converted_layers(config: LinearizeConfig) -> list[int]:
    """Every second layer: one in front of each keeps exact attention."""
    return list(range(1, config.layers, 2))


def train_llama(tokenizer, data: torch.Tensor, config: LinearizeConfig) -> tuple[LlamaForCausalLM, float]:
    """A Llama of its own, saved with the tokenizer; and the seconds."""
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
    ).train()
    seconds = train_on_text("llama", llama, data, config.steps, config.lr, config.batch)
    with new_folder(Path(config.output) / "llama", overwrite=True) as folder:
        llama.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return llama, seconds


def linearize(config: LinearizeConfig) -> dict:
    """All stages; returns the record for JSON."""
    set_seed(config.seed)
    output, tokenizer = Path(config.output), mc.byte_tokenizer(4 * config.block)
    train, held_out = (blocks(texts, tokenizer, config.block) for texts in reference_texts())
    loss, seconds = {}, {}

    llama, seconds["llama"] = train_llama(tokenizer, train, config)
    loss["llama"] = held_out_loss(llama, held_out, config)
    convert(
        output / "llama",
        output / "converted",
        layers=converted_layers(config),
        overwrite=True,
        memory=config.memory,
        aggregation=config.aggregation,
        segment_size=config.segment_size,
    )
    loss["converted"] = held_out_loss(mc.MCForCausalLM.from_pretrained(output / "converted"), held_out, config)
    model, seconds["match"] = match(llama.eval(), output / "converted", train, config)
    loss["matched"] = held_out_loss(model, held_out, config)

    rank = config.lora_rank
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=mc.MC_LORA_TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter)
    seconds["lora"] = train_on_text("lora", model, train, config.lora_steps, config.lora_lr, config.batch)
    loss["lora"] = held_out_loss(model, held_out, config)
    with new_folder(output / "adapter", overwrite=True) as folder:
        model.save_pretrained(folder)
    return {
        "held_out_nats_per_byte": loss,
        "seconds": seconds,
        "converted_layers": converted_layers(config),
        "parameters": {
            "llama": llama.num_parameters(),
            "hybrid": model.get_base_model().num_parameters(),
            "adapter": model.get_nb_trainable_parameters()[0],
        },
        "config": asdict(config),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def main() -> None:
    (config,) = HfArgumentParser(LinearizeConfig).parse_args_into_dataclasses()
    path, start = Path(config.output) / "result.json", time.perf_counter()
    record = {"command": shlex.join(["python", *sys.argv])} | linearize(config)
    record["seconds"]["all"] = time.perf_counter() - start
    record["cpu_seconds"] = time.process_time()  # of all threads: what a busy machine does not change
    write_file(path, json.dumps(record, indent=2) + "\n")
    print(f"\nheld-out loss, nats per byte ({len(record['converted_layers'])} of {config.layers} layers converted)")
    for name, value in record["held_out_nats_per_byte"].items():
        print(f"  {name:<10} {value:.3f}")
    print(f"{record['seconds']['all']:.0f} s; models and numbers are in {config.output}")


if __name__ == "__main__":
    main()
