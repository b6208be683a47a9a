"""`bundle --space`: a page and a model in one folder, which needs no package."""

import json
import os
import subprocess
import sys

import pytest

from helpers import build, small_config
from mc_transformers import byte_tokenizer
from mc_transformers.cli.main import main


# as `app.py` does, without the page itself, where this package cannot be imported
CHECK = """
import json, sys
sys.modules["mc_transformers"] = None
sys.path.insert(0, sys.argv[1])
from app import Reading
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1] + "/model"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
reading = Reading(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
reading.read("The whale was white. " * 3)
answer = reading.ask("Who?", 5)
other = Reading(model, reading.tokenizer)
other.load(reading.save())
print(json.dumps([answer, other.ask("Who?", 5), len(reading.pieces), "strongest segment" in reading.picture()]))
"""


def test_a_space_works_alone(tmp_path) -> None:
    model = build(small_config("gated_delta", vocab_size=258))
    model.save_pretrained(tmp_path / "model")
    arguments = ["bundle", str(tmp_path / "model"), str(tmp_path / "space"), "--space", "--no-verify"]
    assert main(arguments) == 1 and not (tmp_path / "space").exists()  # without a tokenizer
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert main(arguments) == 0
    assert {x.name for x in (tmp_path / "space").iterdir()} == {"app.py", "README.md", "requirements.txt", "model"}
    readme = (tmp_path / "space" / "README.md").read_text("utf-8")
    assert readme.startswith('---\ntitle: "The memory of space"') and "sdk: gradio" in readme
    run = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "space")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    answer, again, segments, shown = json.loads(run.stdout.splitlines()[-1])
    assert answer == again and segments == -(-63 // 8) and shown


@pytest.mark.parametrize("option", [[], ["--space"]])
def test_an_existing_folder_is_not_replaced(option: list[str], tmp_path, capsys) -> None:
    build(small_config(vocab_size=258)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    assert main(["bundle", str(tmp_path / "model"), str(tmp_path / "out"), "--no-verify", *option]) == 1
    assert "exists already" in capsys.readouterr().err and (tmp_path / "out" / "kept").exists()
