"""Continue a text, or talk, with a model that `mc-transformers export` has written; nothing of PyTorch is needed:

    pip install onnxruntime numpy tokenizers
    python onnx_chat.py outputs/onnx --prompt "The with statement"
    python onnx_chat.py outputs/onnx --memory notes.npz --prompt "$(cat book.txt)" --max-new-tokens 1
    python onnx_chat.py outputs/onnx --memory notes.npz

Without a prompt it asks for one line after the other. What was said stays in the memory, and in the file of --memory.
"""

import argparse
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from onnx_model import Memory, OnnxModel


def answer(model: OnnxModel, tokenizer: Tokenizer, memory: Memory, text: str, args: argparse.Namespace) -> None:
    """Read a text and print what follows, a character as soon as all of its tokens are there."""
    start, tokens, shown = time.perf_counter(), [], ""
    ids = tokenizer.encode(text, add_special_tokens=memory.seen == 0).ids
    for token in model.generate(memory, ids, args.max_new_tokens, args.temperature, args.seed):
        tokens.append(token)
        found = tokenizer.decode(tokens)
        if not found.endswith("\ufffd"):
            print(found[len(shown) :], end="", flush=True)
            shown = found
    seconds = time.perf_counter() - start
    print(f"\n[{len(ids)} + {len(tokens)} tokens in {seconds:.2f} s; {memory.seen} in the memory]", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what `mc-transformers export` wrote")
    parser.add_argument("--prompt", help="a text to continue (lines from the keyboard)")
    parser.add_argument("--memory", metavar="FILE", help="go on from this .npz, if it is there, and write it")
    parser.add_argument("--turn", default="{}\n", help="what becomes of a line from the keyboard (%(default)r)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest token (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (%(default)s)")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime (it chooses)")
    args = parser.parse_args()
    model = OnnxModel(args.folder, args.threads)
    tokenizer = Tokenizer.from_file(str(Path(args.folder) / "tokenizer.json"))
    memory = model.load(args.memory) if args.memory and Path(args.memory).exists() else model.empty()
    texts = [args.prompt] if args.prompt is not None else (args.turn.format(line.rstrip("\n")) for line in sys.stdin)
    for text in texts:
        answer(model, tokenizer, memory, text, args)
        if args.memory:
            model.save(memory, args.memory)


if __name__ == "__main__":
    main()
