"""Read a long document once, keep its memory in a file, and ask about it later, in another process.

    python examples/memory_file.py read --model outputs/lm/final --text book.txt --memory outputs/book
    python examples/memory_file.py ask --model outputs/lm/final --memory outputs/book --question "Who is Ahab?"

The second command reads nothing of the book: the memory holds one state per segment, and `ask` leaves it as it was.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import mc_transformers as mc


@torch.inference_mode()
def read(model, tokenizer, text: str, piece: int) -> mc.MCCache:
    """The memory of `text`, read `piece` tokens at a time, so that activations stay small."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    cache = mc.MCCache(config=model.config)
    for part in tqdm(ids.split(piece, 1), desc="reading", unit="piece"):
        model(part, cache=cache, logits_to_keep=1)
    return cache


def ask(model, tokenizer, cache: mc.MCCache, question: str, max_new_tokens: int) -> str:
    """What the model writes after the document and the question."""
    ids = tokenizer(question, return_tensors="pt")["input_ids"].to(model.device)
    prompt = cache.prompt(ids)
    out = model.generate(**prompt, cache=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("read", "ask"))
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--memory", required=True, help="folder of the memory file")
    parser.add_argument("--text", help="read: the document, a text file")
    parser.add_argument("--piece", type=int, default=4096, help="read: tokens at a time")
    parser.add_argument("--question", help="ask: what follows the document")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="ask: length of the answer")
    args = parser.parse_args()
    needed = {"read": "text", "ask": "question"}[args.action]
    if getattr(args, needed) is None:
        parser.error(f"{args.action} needs --{needed}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto").eval()
    if args.action == "read":
        cache = read(model, tokenizer, Path(args.text).read_text(encoding="utf-8"), args.piece)
        cache.save_pretrained(args.memory)
        print(f"{cache.get_seq_length()} tokens in {cache.num_segments} segments, {cache.nbytes / 1e6:.1f} MB")
    else:
        cache = mc.MCCache.from_pretrained(args.memory, model)
        print(ask(model, tokenizer, cache, args.question, args.max_new_tokens))


if __name__ == "__main__":
    main()
