"""Train a Memory Caching language model from random weights, or go on with a saved one, with Transformers' Trainer.

    python examples/train_lm.py --train_files 'books/*.txt' --preset mc-170m --output_dir outputs/lm --max_steps 1000
    python examples/train_lm.py --dataset roneneldan/TinyStories --streaming --packing --max_steps 1000 \
        --config '{"memory": "titans", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}'

Every option of `TrainingArguments` is an option here too. Several GPUs or nodes: docs/scaling.md.
"""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

import mc_transformers as mc


@dataclass
class ModelOptions:
    model: str | None = HfArg(default=None, help="folder or Hub name of a model to go on with; else random weights")
    preset: str | None = HfArg(default=None, help="a published size, as MCConfig.from_preset names it")
    config: str = HfArg(default="{}", help="fields of MCConfig as JSON; they come before those of the preset")
    tokenizer: str | None = HfArg(default=None, help="folder or Hub name; else the model's, else one token per byte")


@dataclass
class DataOptions:
    dataset: str | None = HfArg(default=None, help="any dataset that `datasets` can load")
    dataset_config: str | None = HfArg(default=None, help="its configuration")
    split: str = HfArg(default="train", help="its split to train on")
    validation_split: str | None = HfArg(default=None, help="its split to evaluate on")
    text_column: str = HfArg(default="text", help="its column of text")
    train_files: str | None = HfArg(
        default=None, help="instead of a dataset: a pattern of text files, one document each"
    )
    validation_files: str | None = HfArg(default=None, help="local text files to evaluate on")
    streaming: bool = HfArg(default=False, help="read while training, and keep nothing on disk (needs --max_steps)")
    packing: bool = HfArg(default=False, help="documents of a batch in one row, none sees another; else padding")
    block: int = HfArg(default=1024, help="longest row of tokens: longer documents are cut")


def load_texts(data: DataOptions) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Training and evaluation documents in a column `text_column`.

    Raises:
        ValueError: not exactly one source of training text.
    """
    if (data.dataset is None) == (data.train_files is None):
        raise ValueError("give exactly one of `--dataset` and `--train_files`")
    if data.dataset is not None:
        splits = [data.split, data.validation_split]
        source = {"path": data.dataset, "name": data.dataset_config}
    else:
        files = {"train": data.train_files, "validation": data.validation_files}
        splits = ["train", "validation" if data.validation_files else None]
        files = {split: pattern for split, pattern in files.items() if pattern}
        source = {"path": "text", "data_files": files, "sample_by": "document"}
    train, held_out = (
        None if split is None else load_dataset(**source, split=split, streaming=data.streaming) for split in splits
    )
    return train, held_out


def tokenize(texts, tokenizer: PreTrainedTokenizerBase, data: DataOptions):
    """Rows of at most `block` tokens; a document ends with the end-of-text token."""

    def cut(batch: dict) -> dict:
        rows = []
        for ids in tokenizer(batch[data.text_column], verbose=False)["input_ids"]:
            ids = [*ids, tokenizer.eos_token_id]
            rows += [ids[i : i + data.block] for i in range(0, len(ids), data.block)]
        return {"input_ids": rows, "labels": rows}

    return texts.map(cut, batched=True, remove_columns=texts.column_names or list(next(iter(texts))))


def load_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """The saved model, or one with random weights that fits the tokenizer."""
    if options.model is not None:
        return AutoModelForCausalLM.from_pretrained(options.model)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    fields = {"vocab_size": len(tokenizer), **ids, **json.loads(options.config)}
    return mc.MCForCausalLM(
        mc.MCConfig.from_preset(options.preset, **fields) if options.preset else mc.MCConfig(**fields)
    )


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    name = options.tokenizer or options.model
    tokenizer = mc.byte_tokenizer() if name is None else AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads rows on the right: on the left the last padding would be asked for the first token.

    Padding has no labels, but the end of a text has, though the same token may stand for both.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer)


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataOptions, args: TrainingArguments
) -> Trainer:
    """A Trainer on the texts; it takes borders of packed documents and padding from its collator."""
    if data.packing:
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        # else Accelerate reads a stream on one process and deals out rows: it would cut the borders like rows
        args.accelerator_config.dispatch_batches = False
    else:
        collator = padding_collator(tokenizer)
    train, held_out = (texts and tokenize(texts, tokenizer, data) for texts in load_texts(data))
    return Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
    )


def save(run: Trainer) -> None:
    """To `output_dir`/final, which is there only when it is whole."""
    final = Path(run.args.output_dir) / "final"
    partial = final.with_name("final.partial")
    run.save_model(str(partial))
    run.accelerator.wait_for_everyone()
    if run.is_world_process_zero():
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)


def main() -> None:
    parser = HfArgumentParser((ModelOptions, DataOptions, TrainingArguments))
    options, data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = load_tokenizer(options)
    run = make_trainer(load_model(options, tokenizer), tokenizer, data, args)
    run.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if run.eval_dataset is not None:
        run.log_metrics("eval", run.evaluate())
    save(run)


if __name__ == "__main__":
    main()
