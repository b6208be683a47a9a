"""Fine-tune a saved model with LoRA: every projection gets a small adapter, the model itself stays as it is.

    python examples/finetune_lora.py --model outputs/lm/final --train_files 'notes/*.txt' \
        --output_dir outputs/adapter --max_steps 200 --learning_rate 1e-3

The adapter is written to `output_dir`/final; `--merge` writes a model with the adapter inside instead. Every option of
`TrainingArguments` is an option here too.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

import mc_transformers as mc


@dataclass
class DataOptions:
    model: str = HfArg(help="folder or Hub name of the trained model")
    dataset: str | None = HfArg(default=None, help="any dataset that `datasets` can load")
    dataset_config: str | None = HfArg(default=None, help="its configuration")
    split: str = HfArg(default="train", help="its split to train on")
    validation_split: str | None = HfArg(default=None, help="its split to evaluate on")
    text_column: str = HfArg(default="text", help="its column of text")
    train_files: str | None = HfArg(default=None, help="instead of a dataset: a pattern of text files")
    validation_files: str | None = HfArg(default=None, help="text files to evaluate on")
    block: int = HfArg(default=1024, help="longest row of tokens: longer documents are cut")


@dataclass
class AdapterOptions:
    rank: int = HfArg(default=16, help="rank of the adapters")
    alpha: int = HfArg(default=32, help="their scale is alpha / rank")
    dropout: float = HfArg(default=0.0, help="dropout in front of them")
    dora: bool = HfArg(default=False, help="DoRA: direction and size of the weights apart")
    merge: bool = HfArg(default=False, help="write the model with the adapter inside")


def load_rows(data: DataOptions, split: str | None, files: str | None, tokenizer) -> Dataset | None:
    """Rows of at most `block` tokens from a split or from files; a document ends with the end-of-text token."""
    if data.dataset is not None and split is not None:
        texts = load_dataset(data.dataset, data.dataset_config, split=split)
    elif files is not None:
        texts = load_dataset("text", data_files=files, sample_by="document", split="train")
    else:
        return None

    def cut(batch: dict) -> dict:
        rows = []
        for ids in tokenizer(batch[data.text_column], verbose=False)["input_ids"]:
            ids = [*ids, tokenizer.eos_token_id]
            rows += [ids[i : i + data.block] for i in range(0, len(ids), data.block)]
        return {"input_ids": rows, "labels": rows}

    return texts.map(cut, batched=True, remove_columns=texts.column_names)


def load_tokenizer(name: str, padding_side: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side=padding_side)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    parser = HfArgumentParser((DataOptions, AdapterOptions, TrainingArguments))
    data, adapter, args = parser.parse_args_into_dataclasses()
    if (data.dataset is None) == (data.train_files is None):
        raise ValueError("give exactly one of `--dataset` and `--train_files`")
    set_seed(args.seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=mc.MC_LORA_TARGETS,
        task_type=TaskType.CAUSAL_LM,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(data.model), config)
    model.print_trainable_parameters()
    tokenizer = load_tokenizer(data.model, "left")  # as generation wants it: this one is saved
    run = Trainer(
        model=model,
        args=args,
        train_dataset=load_rows(data, data.split, data.train_files, tokenizer),
        eval_dataset=load_rows(data, data.validation_split, data.validation_files, tokenizer),
        # on the left, the last padding would be asked for the first token; padding has no labels
        data_collator=DataCollatorForSeq2Seq(load_tokenizer(data.model, "right")),
        processing_class=tokenizer,
    )
    run.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if run.eval_dataset is not None:
        run.log_metrics("eval", run.evaluate())
    if adapter.merge:
        run.model = run.accelerator.unwrap_model(run.model).merge_and_unload()
    save(run)


if __name__ == "__main__":
    main()
