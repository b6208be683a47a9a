"""What training runs leave behind, turned into model folders, and models into plain state dicts."""

import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import Trainer, TrainingArguments

from helpers import build, small_config, tokens
from mc_transformers import MCForCausalLM
from mc_transformers.cli import main as cli
from mc_transformers.conversion.training import from_training, our_name, to_state_dict


@pytest.fixture
def model():
    return build(small_config("gated_delta", aggregation="grm", num_hidden_layers=2))


def same(folder, model) -> bool:
    loaded = MCForCausalLM.from_pretrained(folder).state_dict()
    return loaded.keys() == model.state_dict().keys() and all(
        torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items()
    )


def distributed(folder, model, config_in="") -> None:
    """As a training script with FSDP2 stores it, the optimizer included."""
    adam = torch.optim.AdamW(model.parameters())
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    adam.step()
    state = {"app": {"model": model.state_dict(), "optim": adam.state_dict(), "step": 7}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(folder / config_in)


def plain(folder, model) -> None:
    folder.mkdir()
    torch.save({f"_orig_mod.{name}": x for name, x in model.state_dict().items()}, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


def nested(folder, model) -> None:
    folder.mkdir()
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {"lr": 0.1}, "step": 3}, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


def accelerated(folder, model) -> None:
    """The folder of a run with FSDP: the weights one folder deeper."""
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    model.config.save_pretrained(folder)


def saved(folder, model) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("write", [distributed, plain, nested, accelerated, saved])
def test_every_format_gives_the_model_back(tmp_path, model, write):
    write(tmp_path / "run", model)
    from_training(tmp_path / "run", tmp_path / "model", max_shard_size="15KB")
    assert same(tmp_path / "model", model)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1


def test_checkpoint_of_the_trainer(tmp_path, model):
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        save_steps=1,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens(4, 12)]).train()
    assert cli.main(["convert", str(tmp_path / "run" / "checkpoint-1"), str(tmp_path / "model")]) == 0
    assert same(tmp_path / "model", model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_folder_with_the_config_above_it(tmp_path, model, capsys):
    accelerated(tmp_path / "run", model)
    weights = str(tmp_path / "run" / "pytorch_model_fsdp_0")
    assert cli.main(["convert", weights, str(tmp_path / "model")]) == 0 and same(tmp_path / "model", model)
    (tmp_path / "run" / "config.json").rename(tmp_path / "elsewhere.json")
    assert cli.main(["convert", weights, str(tmp_path / "again")]) == 1
    assert "--config" in capsys.readouterr().err
    argv = ["convert", weights, str(tmp_path / "again"), "--config", str(tmp_path / "elsewhere.json")]
    assert cli.main(argv) == 0 and same(tmp_path / "again", model)


def test_dtype_and_another_aggregation(tmp_path, model):
    saved(tmp_path / "run", model)
    from_training(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    half = MCForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        kept = name.endswith(("a_bias.bias", "b_bias.bias", "A_log.bias"))
        assert torch.equal(half[name], tensor if kept else tensor.bfloat16()), name
    plain_rnn = build(small_config("linear", aggregation="none"))
    saved(tmp_path / "rnn", plain_rnn)
    from_training(tmp_path / "rnn", tmp_path / "mean", aggregation="mean", segment_size=4)
    config = MCForCausalLM.from_pretrained(tmp_path / "mean").config
    assert (config.aggregation, config.segment_size) == ("mean", 4) and same(tmp_path / "mean", plain_rnn)


def test_out_to_a_plain_state_dict_and_in_again(tmp_path, model):
    saved(tmp_path / "model", model)
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "weights.pt"), "--state-dict"]) == 0
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    MCForCausalLM(model.config).load_state_dict(weights)
    from_training(tmp_path / "weights.pt", tmp_path / "again", config=tmp_path / "model" / "config.json")
    assert same(tmp_path / "again", model)
    with pytest.raises(FileExistsError):
        to_state_dict(str(tmp_path / "model"), tmp_path / "weights.pt")
    to_state_dict(str(tmp_path / "model"), tmp_path / "weights.pt", "bfloat16", overwrite=True)
    assert torch.load(tmp_path / "weights.pt")["lm_head.weight"].dtype == torch.bfloat16
    assert to_state_dict(str(tmp_path / "model"), tmp_path / "new" / "weights.pt").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_names():
    known = {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "app.model.model.layers.0.mlp.up_proj.weight",
        "layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
    ):
        assert our_name(name, known) == "model.layers.0.mlp.up_proj.weight"
    assert our_name("app.optim.state.model.layers.0.mlp.up_proj.weight.exp_avg", known) is None
    with pytest.raises(ValueError, match="left over"):
        our_name("model.layers.1.mlp.up_proj.weight", known)


# ------------------------------------------------------------------------------------------------------- bad inputs
@pytest.mark.parametrize("option", ["--verify-logits", "--layers=0"])
def test_options_of_other_architectures_are_refused(tmp_path, model, option, capsys):
    saved(tmp_path / "run", model)
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "model"), option]) == 1
    assert option.split("=")[0] in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_config_and_index_that_are_none(tmp_path, model, capsys):
    saved(tmp_path / "run", model)
    (tmp_path / "run" / "model.safetensors.index.json").write_text("{")
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "model")]) == 1
    assert "model.safetensors.index.json" in capsys.readouterr().err
    (tmp_path / "run" / "config.json").write_text("[1]")
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "model")]) == 1
    assert "config.json does not hold a dictionary" in capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def bad_index(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))


def cut_index(folder):
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes()[:-30])


def cut_data(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lost_data(folder):
    next(folder.glob("*.distcp")).unlink()


def code_in_a_file(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"x": Payload()}, folder / "pytorch_model.bin")


def no_state_dict(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


BAD = {
    bad_index: "not an index of a sharded",
    cut_index: "damaged",
    cut_data: "damaged or cut off",
    lost_data: "not there",
    code_in_a_file: "holds code",
    no_state_dict: "not a state dict",
    empty: "holds no model.safetensors",
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_files_are_refused_and_nothing_runs(tmp_path, model, damage, capsys):
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "run", no_dist=True)
    model.config.save_pretrained(tmp_path)
    damage(tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "model")]) == 1
    out, err = capsys.readouterr()
    assert BAD[damage] in err.splitlines()[-1] and "executed" not in out + err
    assert sorted(tmp_path.iterdir()) == before


def test_left_over_and_missing_weights(tmp_path, model):
    saved(tmp_path / "run", model)
    with pytest.raises(ValueError, match="u_proj.*left over"):
        from_training(tmp_path / "run", tmp_path / "model", aggregation="mean")
    saved(tmp_path / "rnn", build(small_config("gated_delta", aggregation="none", num_hidden_layers=1)))
    with pytest.raises(ValueError, match="lacks"):
        from_training(tmp_path / "rnn", tmp_path / "model", config=tmp_path / "run" / "config.json")
    assert not (tmp_path / "model").exists()
