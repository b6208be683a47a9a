"""Tiny models in vLLM, and what `generate` says of the same prompts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers import build
from mc_transformers import MCConfig, MCForCausalLM


pytest.importorskip("vllm", reason="vllm is not installed")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


VOCAB = 512
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "segment_size": 8,
    "memory_chunk_size": 4,
    "memory_expansion": 2,
    "num_selected_segments": 2,
    "max_position_embeddings": 512,
}
NEW = 20  # tokens of an answer: two or three borders of segments


def make(folder: Path, dtype: torch.dtype = torch.float32, **fields) -> MCForCausalLM:
    """A tiny model with weights that have effect, also saved in `folder`."""
    model = build(MCConfig(**TINY | fields), dtype=dtype)
    model.save_pretrained(folder, with_code=False)
    return model


@contextmanager
def engine(folder: Path, **options) -> Iterator[LLM]:
    """vLLM with the model in `folder`; everything is let go of at the end."""
    fixed = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "dtype": "float32",
        "disable_log_stats": False,
    }
    llm = LLM(model=str(folder), **fixed | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def expected(model: MCForCausalLM, texts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """The greedy answers of `generate`, prompt by prompt."""
    answers = []
    for text in texts:
        ids = torch.tensor([text])
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        answers.append(out[0, len(text) :].tolist())
    assert len({token for answer in answers for token in answer}) > len(answers)  # they say something
    return answers


def greedy(new: int = NEW) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def answers(llm: LLM, texts: list[list[int]], new: int = NEW) -> tuple[list[list[int]], int]:
    """What vLLM answers, all prompts at once, and how many of their tokens it had read before."""
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], greedy(new), use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs], sum(o.num_cached_tokens for o in outputs)


def metric(llm: LLM, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")
