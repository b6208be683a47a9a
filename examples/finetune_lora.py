"""Fine-tune a saved model with LoRA: every projection gets a small adapter, the model itself stays as it is.

    python examples/finetune_lora.py --model outputs/lm/final --train_files 'notes/*.txt' \
        --output_dir outputs/adapter --max_steps 200 --learning_rate 1e-3

The adapter is written to `output_dir`/final; `--merge` writes a model with the adapter inside instead.
"""

from dataclasses import dataclass

from peft import LoraConfig, TaskType, get_peft_model
from transformers import HfArgumentParser, TrainingArguments, set_seed

import mc_transformers as mc
from train_lm import DataOptions, ModelOptions, load_model, load_tokenizer, make_trainer, option, save


@dataclass
class AdapterOptions:
    rank: int = option(16, "rank of the adapters")
    alpha: int = option(32, "their scale is alpha / rank")
    dropout: float = option(0.0, "dropout in front of them")
    dora: bool = option(False, "DoRA: direction and size of the weights apart")
    merge: bool = option(False, "write the model with the adapter inside")


def main() -> None:
    parser = HfArgumentParser((ModelOptions, DataOptions, AdapterOptions, TrainingArguments))
    options, data, adapter, args = parser.parse_args_into_dataclasses()
    if options.model is None:
        raise ValueError("give `--model`: an adapter needs a trained model")
    set_seed(args.seed)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=mc.MC_LORA_TARGETS,
        task_type=TaskType.CAUSAL_LM,
    )
    tokenizer = load_tokenizer(options)
    model = get_peft_model(load_model(options, tokenizer), config)
    model.print_trainable_parameters()
    run = make_trainer(model, tokenizer, data, args)
    run.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if run.eval_dataset is not None:
        run.log_metrics("eval", run.evaluate())
    if adapter.merge:
        run.model = run.accelerator.unwrap_model(run.model).merge_and_unload()
    save(run)


if __name__ == "__main__":
    main()
