"""For every test: seeds, one thread per worker, no network, Triton in its interpreter, repeatable random examples."""

import os


# Triton chooses between compiler and interpreter when it is imported, which the next imports may do
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch
from transformers import set_seed


os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed():
    set_seed(0)


@pytest.fixture
def any_peft(monkeypatch):
    """`model.add_adapter` of Transformers 5.24 asks for PEFT 0.22; with an older one it is tested all the same."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0")
