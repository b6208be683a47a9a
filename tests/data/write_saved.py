"""Writes what tests/hub/test_saved.py loads: what this version saves, so that later versions are held to reading it.

    python tests/data/write_saved.py tests/data/saved/0.1.0

Run it once per release, and never over an old folder. It uses the public interface only, so that it also runs in an
old checkout. The model is a hybrid with all that a config may hold that Transformers does not know.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed

import mc_transformers as mc


WORDS = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"]
READ, ASKED = 21, 4  # tokens that go into the memory file, and tokens that are read after it


def tokenizer() -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", bos_token="<end>")


@torch.no_grad()
def main(folder: Path) -> None:
    """Checkpoint, bundle (packed), memory file, and the logits that loading them must give."""
    set_seed(0)
    config = mc.MCConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_types=["memory_caching", "full_attention", "memory_caching"],
        memory="gated_delta",
        aggregation="ssc",
        num_selected_segments=2,
        segment_size=4,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = mc.MCForCausalLM(config).eval()
    model.save_pretrained(folder / "checkpoint")
    tokenizer().save_pretrained(folder / "checkpoint")
    ids = torch.randint(2, len(WORDS), (1, READ + ASKED))
    cache = mc.MCCache(config=config)
    model(ids[:, :READ], cache=cache)
    cache.save_pretrained(folder / "memory", model)
    save_file({"input_ids": ids, "logits": model(ids).logits}, folder / "expected.safetensors")
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary) / "bundle"
        command = [sys.executable, "-m", "mc_transformers", "bundle", str(folder / "checkpoint"), str(bundle)]
        subprocess.run(command, check=True)
        (bundle / "memory.png").unlink(missing_ok=True)
        with tarfile.open(folder / "bundle.tar.xz", "w:xz", preset=9) as archive:
            archive.add(bundle, "bundle", filter=lambda entry: entry.replace(mtime=0, uname="", gname="", deep=False))
    for file in (folder / "checkpoint").glob("*.py"):  # the bundle has them
        file.unlink()
    (folder / "checkpoint" / "LICENSE").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
