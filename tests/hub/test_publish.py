"""From a checkpoint to a repository of a Hub (on the loopback interface) and back, also when something goes wrong."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.utils import hub as transformers_hub

import fake_hub
from helpers import build, small_config, tokens
from mc_transformers import MCForCausalLM, byte_tokenizer
from mc_transformers.cli import main as cli
from mc_transformers.hub import bundle, files, flat
from mc_transformers.hub.publish import upload


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process takes for the real one."""
    with fake_hub.serve() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # another test may have made it for the real Hub
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = byte_tokenizer(512)
    build(small_config("gated_linear", vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def unchecked(monkeypatch):
    """Bundles without the check in a process of its own, which takes its time; one test keeps it."""
    monkeypatch.setattr(bundle, "verify_bundle", lambda folder, model: None)


def call(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


def complete(files: dict[str, bytes]) -> bool:
    return {"config.json", "model.safetensors", "README.md", "LICENSE", *flat.flat_files()} <= set(files)


LOAD = """
import sys
sys.modules["mc_transformers"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/model", revision=sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.me.model.")
tokenizer = AutoTokenizer.from_pretrained("me/model", revision=sys.argv[1], trust_remote_code=True)
assert tokenizer("a")["input_ids"] == [99]
with torch.no_grad():
    save_file({"logits": model(load_file("ids.safetensors")["ids"]).logits}, "logits.safetensors")
"""


def test_publish_and_load_from_the_hub_without_the_package(capsys, hub, checkpoint, tmp_path):
    code, out, _ = call(
        capsys, "publish", checkpoint, "me/model", "--private", "--tag", "v1", "--max-shard-size", "20KB"
    )
    files = hub.files("me/model", "v1")
    assert code == 0 and f"{hub.url}/me/model/commit/" in out
    assert hub.repositories["me/model"].private and files == hub.files("me/model")
    assert len([name for name in files if name.endswith(".safetensors")]) > 1

    ids = tokens(2, 30)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }
    subprocess.run([sys.executable, "-c", LOAD, "v1"], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        expected = cli.load_model(checkpoint)(ids).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_dry_run_uploads_nothing(capsys, hub, checkpoint, unchecked):
    code, out, _ = call(capsys, "publish", checkpoint, "me/model", "--dry-run")
    assert code == 0 and "model.safetensors" in out and "nothing was uploaded" in out
    assert hub.log == [] and hub.repositories == {}


def test_pull_request_branch_and_its_continuation(capsys, hub, checkpoint, unchecked):
    assert call(capsys, "publish", checkpoint, "me/model", "--revision", "next")[0] == 0
    assert hub.files("me/model") == {} and complete(hub.files("me/model", "next"))
    code, out, _ = call(capsys, "publish", checkpoint, "me/model", "--create-pr")
    assert code == 0 and f"{hub.url}/me/model/discussions/1" in out
    assert hub.files("me/model") == {} and complete(hub.files("me/model", "refs/pr/1"))
    assert call(capsys, "publish", checkpoint, "me/model", "--revision", "refs/pr/1")[0] == 0
    assert "refs/pr/2" not in hub.repositories["me/model"].refs
    code, _, err = call(capsys, "publish", checkpoint, "me/model", "--create-pr", "--tag", "v1")
    assert code == 1 and "pull request" in err


def test_interruption_leaves_nothing_and_resumes(capsys, hub, checkpoint, unchecked):
    argv = ("publish", checkpoint, "me/model", "--max-shard-size", "20KB")
    hub.fail_after = 1
    code, _, err = call(capsys, *argv)
    assert code == 1 and "error" in err.splitlines()[-1]
    assert len(hub.uploads) == 1 and hub.files("me/model") == {}
    hub.fail_after = None
    assert call(capsys, *argv)[0] == 0
    names = [name for name in hub.files("me/model") if name.endswith(".safetensors")]
    assert len(hub.uploads) == len(set(hub.uploads)) == len(names) > 2  # what had arrived was not sent again


def test_a_new_version_replaces_the_old_one_and_keeps_the_card(capsys, hub, checkpoint, unchecked):
    assert call(capsys, "publish", checkpoint, "me/model", "--max-shard-size", "20KB")[0] == 0
    api = HfApi()
    own = {"README.md": b"---\nlicense: mit\n---\nmine", "memory.png": b"mine"}
    for name, content in (own | {"old_kernel.py": b"", "data.txt": b"x"}).items():
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="me/model")
    assert call(capsys, "publish", checkpoint, "me/model")[0] == 0
    files = hub.files("me/model")
    assert own | {"data.txt": b"x"} == {name: files[name] for name in (*own, "data.txt")}
    assert [name for name in files if "safetensors" in name or "old" in name] == ["model.safetensors"]
    assert call(capsys, "publish", checkpoint, "me/model", "--replace-card")[0] == 0
    files = hub.files("me/model")
    assert b"Memory Caching" in files["README.md"] and files["memory.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("where", ["create", "preupload", "batch", "commit", "tag", "resolve"])
def test_a_page_instead_of_an_answer_is_one_line(capsys, hub, checkpoint, unchecked, where):
    """As gateways and login pages send it, with status 200."""
    hub.html = where
    code, _, err = call(capsys, "publish", checkpoint, "me/model", "--tag", "v1")
    line = err.splitlines()[-1]
    asked = [entry for entry in hub.log if where in entry]
    assert asked and "Traceback" not in err
    if where in ("tag", "resolve"):  # whose answers nobody reads
        assert code == 0
        return
    assert code == 1 and line.startswith("mc-transformers publish: error: ") and "none of the Hub's" in line
    assert hub.repositories.get("me/model") is None or hub.files("me/model") == {}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", [1, 3, 6, 8])
def test_stopped_while_publishing(hub, checkpoint, unchecked, tmp_path, monkeypatch, kind, moment):
    """At some request: the repository has nothing or everything, the next call completes it, and nothing stays in the
    system's temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(files, "GRACE", -1)

    def whole() -> bool:
        return {"model.safetensors.index.json", "config.json", "README.md"} <= set(hub.files("me/model"))

    def publish() -> int:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                os._exit(cli.main(["publish", checkpoint, "me/model", "--max-shard-size", "20KB"]))
            finally:
                os._exit(99)
        hub.watch = lambda number: os.kill(child, kind) if number == moment else None
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert publish() == (130 if kind == signal.SIGINT else -kind)
    assert hub.repositories.get("me/model") is None or hub.files("me/model") == {} or whole()
    assert kind == signal.SIGKILL or not list(tmp_path.iterdir())
    assert publish() == 0 and whole() and not list(tmp_path.iterdir())


def test_wrong_token_is_one_line_without_the_token(capsys, hub, checkpoint, unchecked, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, err = call(capsys, "publish", checkpoint, "me/model")
    line = err.splitlines()[-1]
    assert code == 1 and "401" in line and line.startswith("mc-transformers publish: error: ")
    assert "hf_wrong" not in out + err and "Traceback" not in err and hub.repositories == {}


def test_a_repository_that_cannot_be_read_says_why(capsys, hub, monkeypatch):
    code, _, err = call(capsys, "info", "me/missing")
    assert code == 1 and "private repository" in err.splitlines()[-1]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = call(capsys, "info", "me/missing")
    assert code == 1 and "401" in err.splitlines()[-1] and "hf_wrong" not in err


def test_a_public_repository_is_no_private_one(capsys, hub, checkpoint, unchecked):
    HfApi().create_repo("me/model")
    code, _, err = call(capsys, "publish", checkpoint, "me/model", "--private")
    assert code == 1 and "public" in err and hub.files("me/model") == {}


def test_nothing_is_uploaded_when_the_bundle_is_wrong(capsys, hub, checkpoint, monkeypatch):
    def differ(folder, model):
        raise RuntimeError("differs")

    monkeypatch.setattr(bundle, "verify_bundle", differ)
    code, _, err = call(capsys, "publish", checkpoint, "me/model")
    assert code == 1 and err.endswith("error: differs\n") and hub.log == []


# ----------------------------------------------------------------------------------------------- the methods of models
def test_push_to_hub_makes_the_same_repository(hub, checkpoint, unchecked, capsys):
    model = cli.load_model(checkpoint)
    commit = model.push_to_hub("me/pushed", private=True, tags=["mine"])
    assert commit.oid == hub.repositories["me/pushed"].refs["main"] and hub.repositories["me/pushed"].private
    assert call(capsys, "publish", checkpoint, "me/published")[0] == 0
    pushed, published = hub.files("me/pushed"), hub.files("me/published")
    assert complete(pushed) and set(published) - set(pushed) == {"tokenizer.json", "tokenizer_config.json"}
    same = set(pushed) - {"README.md"}
    assert {name: pushed[name] for name in same} == {name: published[name] for name in same}
    assert "mine" in ModelCard(pushed["README.md"].decode()).data.tags
    assert model.push_to_hub("me/pushed", create_pr=True).pr_url.endswith("/discussions/1")


def test_save_pretrained_pushes_too(hub, checkpoint, tmp_path):
    cli.load_model(checkpoint).save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved")
    assert complete(hub.files("me/saved"))
    assert set(flat.flat_files()) <= {path.name for path in (tmp_path / "saved").iterdir()}


def test_trainer_pushes_a_complete_repository(hub, tmp_path):
    """`Trainer.push_to_hub`, with the Trainer's own card."""
    model = build(small_config("linear"))
    arguments = TrainingArguments(
        output_dir=tmp_path / "trained",
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        hub_model_id="me/trained",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 12)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("me/trained")
    assert complete(files) and json.loads(files["config.json"])["auto_map"] == flat.AUTO_MAP
    assert b"trained" in files["README.md"]


@pytest.mark.usefixtures("any_peft")
def test_adapters_are_pushed_as_adapters(hub, tmp_path):
    adapted = get_peft_model(build(small_config("linear")), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert "modeling_mc.py" not in {path.name for path in (tmp_path / "adapter").iterdir()}
    model = build(small_config("linear"))
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "loaded")
    assert {path.name for path in (tmp_path / "loaded").iterdir()} >= {"adapter_model.safetensors"}
    assert "modeling_mc.py" not in {path.name for path in (tmp_path / "loaded").iterdir()}


def test_upload_refuses_what_excludes_each_other(hub, tmp_path):
    with pytest.raises(ValueError, match="pull request"):
        upload(tmp_path, "me/model", create_pr=True, revision="next")
    assert hub.log == []


def test_saved_models_load_with_and_without_trust(tmp_path):
    model = build(small_config("linear"))
    model.save_pretrained(tmp_path / "saved")
    assert type(MCForCausalLM.from_pretrained(tmp_path / "saved")) is MCForCausalLM
    assert not [path for path in (tmp_path / "saved").iterdir() if "partial" in path.name]
