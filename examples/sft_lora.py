"""Fine-tune a chat model on instructions with TRL's SFTTrainer: LoRA, chat template, packing; merged and saved.

    pip install -e ".[sft]"
    python examples/sft_lora.py --model outputs/smollm2/hybrid --output outputs/smollm2/sft

The instructions are made here: short questions about words, answered in one fixed form, which the model does not use
before. Held-out ones are about other words. The merged model is written with its tokenizer and loaded once more; the
loss of the answers is printed of the model as it came, after the training, and of what was loaded.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import mc_transformers as mc
from mc_transformers.hub.files import new_folder, write_file


WORDS = """river stone window garden bottle candle summer winter bridge silver butter ladder pepper rocket basket
finger market pencil pocket spider temple tunnel velvet wallet yellow anchor beacon canyon dragon engine forest guitar
hammer island jacket kettle lemon marble needle orange parrot quartz ribbon saddle timber violin zipper""".split()


def instructions(words: list[str]) -> list[dict]:
    """Questions and answers as chats: three per word."""
    asked = []
    for word in words:
        spelled = "-".join(word.upper())
        asked += [
            (f"Spell the word {word}.", f"Word: {word}. Spelled: {spelled}."),
            (f"How many letters are in {word}?", f"Word: {word}. Letters: {len(word)}."),
            (f"What are the first and last letters of {word}?", f"Word: {word}. Ends: {spelled[0]}, {spelled[-1]}."),
        ]
    return [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in asked
    ]


@torch.no_grad()
def answer_loss(model, tokenizer, rows: list[dict]) -> float:
    """Nats per token of the answers."""
    total, count, was_training = 0.0, 0, model.training
    model.eval()
    for row in rows:
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        answered = len(ids) - len(start)
        ids = torch.tensor([ids], device=model.device)
        labels = ids.clone()
        labels[:, :-answered] = -100
        total += model(input_ids=ids, labels=labels).loss.item() * answered
        count += answered
    model.train(was_training)
    return total / count


def main(argv: list[str] | None = None) -> dict:
    """Trains, writes and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a model with a chat template")
    parser.add_argument("--output", required=True, help="folder of the merged model, which must not exist")
    parser.add_argument("--steps", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_seed(args.seed)
    words = random.Random(args.seed).sample(WORDS, len(WORDS))
    train, held_out = instructions(words[10:]), instructions(words[:10])
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model)
    losses = {"before": answer_loss(model, tokenizer, held_out)}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=f"{args.output}-trainer",
            max_steps=args.steps,
            learning_rate=args.lr,
            per_device_train_batch_size=1,
            max_length=args.length,
            packing=True,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 10),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules=mc.MC_LORA_TARGETS, task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    losses["after"] = answer_loss(trainer.model, tokenizer, held_out)
    with new_folder(args.output) as folder:
        trainer.model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_file(folder / "sft.json", json.dumps({"losses": losses, "options": vars(args)}, indent=2) + "\n")
    model = AutoModelForCausalLM.from_pretrained(args.output).to(trainer.model.device)
    losses["loaded"] = answer_loss(model, AutoTokenizer.from_pretrained(args.output), held_out)
    print("held-out answers, nats per token: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    print(f"the merged model is in {Path(args.output)}")
    return losses


if __name__ == "__main__":
    main()
