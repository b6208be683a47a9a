"""From random weights to a fine-tuned model in a few minutes on a CPU: what `make demo` runs.

Every stage is a process of its own, so a later stage knows only what it reads from disk:

    pretrain  the Trainer trains a byte-level MCForCausalLM on Python's own documentation and saves it
    finetune  `from_pretrained`, generation with the cache, speed, and a LoRA adapter for Python source code
    reload    base model + adapter from disk, evaluated once more

At the end one table; every number in it was measured in this run.
"""

import importlib
import inspect
import json
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer
from transformers.hf_argparser import HfArg

import mc_transformers as mc
from mc_transformers.hub.files import new_folder, write_file


SOURCE_TRAIN = ("argparse", "ast", "configparser", "csv", "fractions", "inspect", "shutil", "tarfile", "typing")
SOURCE_HELD_OUT = ("statistics", "textwrap")


@dataclass
class DemoConfig:
    """Everything adjustable about the demonstration. Every field is a command-line option."""

    output: str = HfArg(default="outputs/demo", help="folder of the model, the adapter and the table")
    memory: str = HfArg(default="gated_linear", help="write rule of the memory")
    aggregation: str = HfArg(default="grm", help="read rule of the memory")
    segment_size: int = HfArg(default=128, help="tokens per segment")
    hidden_size: int = HfArg(default=128, help="width of the model")
    layers: int = HfArg(default=3, help="number of layers")
    heads: int = HfArg(default=4, help="heads per layer")
    block: int = HfArg(default=512, help="tokens per training sequence")
    batch: int = HfArg(default=8, help="training sequences per step")
    steps: int = HfArg(default=300, help="steps of pretraining")
    lr: float = HfArg(default=3e-3, help="peak learning rate of pretraining")
    lora_steps: int = HfArg(default=60, help="steps of fine-tuning")
    lora_lr: float = HfArg(default=5e-3, help="peak learning rate of fine-tuning")
    lora_rank: int = HfArg(default=8, help="rank of the adapter")
    prompt: str = HfArg(default='The "with" statement is used to', help="what the trained model continues")
    context: int = HfArg(default=4096, help="tokens of context at which speed and cache are measured")
    seed: int = HfArg(default=0, help="seed of weights, data order and sampling")
    stage: str | None = HfArg(default=None, help="run one stage only (internal)")


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


def source_texts() -> tuple[list[str], list[str]]:
    """Source code of modules of the standard library as (training documents, held-out documents)."""
    train, held_out = (
        [inspect.getsource(importlib.import_module(name)) for name in names]
        for names in (SOURCE_TRAIN, SOURCE_HELD_OUT)
    )
    return train, held_out


def blocks(texts: list[str], tokenizer, length: int, stride: int) -> list[dict[str, torch.Tensor]]:
    """Documents joined by the end-of-text token, cut into blocks of `length` tokens, `stride` tokens apart."""
    ids = [i for text in texts for i in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
    return [{"input_ids": block, "labels": block} for block in torch.tensor(ids).unfold(0, length, stride)]


def trainer(config: DemoConfig, model: PreTrainedModel, texts: tuple, tokenizer, steps: int, lr: float) -> Trainer:
    """A Trainer on (training documents, held-out documents). Training blocks overlap by half: more cuts of a text."""
    args = TrainingArguments(
        output_dir=config.output,
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    train, held_out = texts
    return Trainer(
        model=model,
        args=args,
        train_dataset=blocks(train, tokenizer, config.block, config.block // 2),
        eval_dataset=blocks(held_out, tokenizer, config.block, config.block),
    )


def pretrain(config: DemoConfig) -> dict:
    """Trains from random weights on the language reference and saves model and tokenizer."""
    set_seed(config.seed)
    tokenizer = mc.byte_tokenizer(2 * config.context)
    model = mc.MCForCausalLM(
        mc.MCConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            head_dim=config.hidden_size // config.heads,
            max_position_embeddings=2 * config.context,
            memory=config.memory,
            aggregation=config.aggregation,
            segment_size=config.segment_size,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    run = trainer(config, model, reference_texts(), tokenizer, config.steps, config.lr)
    before = run.evaluate()["eval_loss"]
    seconds = run.train().metrics["train_runtime"]
    after = run.evaluate()["eval_loss"]
    with new_folder(Path(config.output) / "model", overwrite=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "pretrain_before": before,
        "pretrain_after": after,
        "pretrain_seconds": seconds,
    }


def finetune(config: DemoConfig) -> dict:
    """Reloads the model, lets it write, measures decoding, trains an adapter on source code and saves it."""
    set_seed(config.seed)
    tokenizer, model = load(config)
    reloaded = trainer(config, model, reference_texts(), tokenizer, 1, 0.0).evaluate()["eval_loss"]
    inputs = tokenizer(config.prompt, return_tensors="pt").to(model.device)
    written = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.7, top_k=40)
    record = {"pretrain_reloaded": reloaded, "sample": tokenizer.decode(written[0], skip_special_tokens=True)}
    record |= measure_decoding(config, model, tokenizer)

    adapted = get_peft_model(
        model, LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=list(mc.MC_LORA_TARGETS))
    )
    record["lora_parameters"] = adapted.get_nb_trainable_parameters()[0]
    run = trainer(config, adapted, source_texts(), tokenizer, config.lora_steps, config.lora_lr)
    record["lora_before"] = run.evaluate()["eval_loss"]
    record["lora_seconds"] = run.train().metrics["train_runtime"]
    record["lora_after"] = run.evaluate()["eval_loss"]
    with new_folder(Path(config.output) / "adapter", overwrite=True) as folder:
        adapted.save_pretrained(folder)
    return record


def reload(config: DemoConfig) -> dict:
    """Base model and adapter from disk."""
    tokenizer, model = load(config)
    adapted = PeftModel.from_pretrained(model, Path(config.output) / "adapter")
    return {"lora_reloaded": trainer(config, adapted, source_texts(), tokenizer, 1, 0.0).evaluate()["eval_loss"]}


def load(config: DemoConfig) -> tuple:
    """Tokenizer and model as any user loads them: `import mc_transformers` taught the Auto classes the family."""
    folder = Path(config.output) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder), model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class Stopwatch(BaseStreamer):
    """Notes when each new token arrives, so that reading the prompt is not counted as decoding."""

    def __init__(self):
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        # generate() hands over the prompt first; the first new token closes the reading of the prompt
        self.tokens_per_second = (len(self.times) - 2) / (self.times[-1] - self.times[1])


def measure_decoding(config: DemoConfig, model: PreTrainedModel, tokenizer) -> dict:
    """Tokens per second with and without the cache; bytes of the cache and of a Transformer of the same width."""
    text = "\n\n".join(reference_texts()[1])
    context = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : config.context].to(model.device)
    record = {"context": context.shape[1]}
    for name, use_cache, new_tokens in (("with_cache", True, 64), ("without_cache", False, 6)):
        watch, cache = Stopwatch(), mc.MCCache(config=model.config) if use_cache else None
        model.generate(
            context,
            attention_mask=torch.ones_like(context),
            cache=cache,
            use_cache=use_cache,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=watch,
        )
        record[f"tokens_per_second_{name}"] = watch.tokens_per_second
        if use_cache:
            record |= {"cache_bytes": cache.nbytes, "cache_segments": int(torch.as_tensor(cache.num_segments).max())}
            record["cache_tokens"] = int(cache.get_seq_length())
    record["transformer_cache_bytes"] = transformer_cache_bytes(model, record["cache_tokens"])
    return record


@torch.no_grad()
def transformer_cache_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Runs a Llama of the same width, depth and dtype over as many tokens; adds up the keys and values it keeps."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in sizes})).to(model.dtype)
    output = llama(torch.zeros(1, num_tokens, dtype=torch.long), logits_to_keep=1, use_cache=True)
    cache = output["cache" if "cache" in output else "past_key_values"]  # the first since Transformers 5.24
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def table(config: DemoConfig, record: dict) -> str:
    """The results as text."""
    r = record
    fewer = r["transformer_cache_bytes"] / r["cache_bytes"]
    faster = r["tokens_per_second_with_cache"] / r["tokens_per_second_without_cache"]
    rows = [
        ("parameters of the model / of the adapter", f"{r['parameters']:,} / {r['lora_parameters']:,}"),
        ("held-out loss, random weights", f"{r['pretrain_before']:.3f} nats per byte"),
        (f"held-out loss after {config.steps} steps", f"{r['pretrain_after']:.3f}"),
        ("the same, reloaded in a new process", f"{r['pretrain_reloaded']:.3f}"),
        ("loss on source code, before LoRA", f"{r['lora_before']:.3f}"),
        (f"loss on source code after {config.lora_steps} steps", f"{r['lora_after']:.3f}"),
        ("the same, base + adapter in a new process", f"{r['lora_reloaded']:.3f}"),
        (f"decoding after {r['context']:,} tokens, cache", f"{r['tokens_per_second_with_cache']:.1f} tokens/s"),
        ("the same, no cache", f"{r['tokens_per_second_without_cache']:.1f} tokens/s ({faster:.0f} times slower)"),
        (f"cache of {r['cache_tokens']:,} tokens", f"{r['cache_bytes']:,} bytes, {r['cache_segments']} segments"),
        ("keys and values of a Transformer", f"{r['transformer_cache_bytes']:,} bytes ({fewer:.1f} times as many)"),
        ("time of training / fine-tuning / everything", " / ".join(f"{r[k]:.0f} s" for k in TIMES)),
    ]
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    title = f"{config.memory} memory, {config.aggregation}, {config.layers} layers of width {config.hidden_size}"
    line = "─" * (left + right + 2)
    return "\n".join([title, line, *(f"{name:<{left}}  {value:<{right}}".rstrip() for name, value in rows), line])


TIMES = ("pretrain_seconds", "lora_seconds", "seconds")
STAGES = {"pretrain": pretrain, "finetune": finetune, "reload": reload}


def main() -> None:
    (config,) = HfArgumentParser(DemoConfig).parse_args_into_dataclasses()
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    if config.stage:
        write_file(output / f"{config.stage}.json", json.dumps(STAGES[config.stage](config)))
        return
    start, record = time.perf_counter(), {}
    for number, stage in enumerate(STAGES, 1):
        print(f"\n[{number}/{len(STAGES)}] {stage}: {STAGES[stage].__doc__}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", stage], check=True)
        record |= json.loads((output / f"{stage}.json").read_text(encoding="utf-8"))
    record["seconds"] = time.perf_counter() - start
    write_file(output / "result.json", json.dumps(record, indent=2) + "\n")
    print(f"\nsample of the pretrained model:\n{record['sample']}\n\n{table(config, record)}")
    print(f"\nmodel, adapter and numbers are in {output}")


if __name__ == "__main__":
    main()
