"""A question to a model through Transformers' own pipeline, as users of a published repository ask it.

    python examples/chat.py outputs/smollm2/bundle --question "What is the capital of France?"

FOLDER is a bundle: the code of the family comes with it (`trust_remote_code`), and this file imports no other.
"""

import argparse

from transformers import pipeline


def ask(folder: str, question: str, tokens: int) -> str:
    """The model's answer to one message of a chat."""
    chat = pipeline("text-generation", folder, trust_remote_code=True)
    messages = [{"role": "user", "content": question}]
    return chat(messages, max_new_tokens=tokens, do_sample=False)[0]["generated_text"][-1]["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--question", default="What is the capital of France?", help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="(%(default)s)")
    args = parser.parse_args()
    print(f"{args.question} - {ask(args.folder, args.question, args.max_new_tokens)}")


if __name__ == "__main__":
    main()
