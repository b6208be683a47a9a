"""Small models of every kind, drawn from the registry: a new memory or choice of the config joins the suite itself."""

import itertools

import pytest
import torch
from torch import nn

from mc_transformers import MCConfig, MCForCausalLM
from mc_transformers.configuration_mc import CHOICES
from mc_transformers.kernels.read.gates import CONSTANT, GATE_FUNCTIONS
from mc_transformers.kernels.shared.ops import HAS_TRITON, triton_interpreted
from mc_transformers.modeling_mc.memories import MEMORIES


VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "segment_size": 8,
    "memory_chunk_size": 4,
    "memory_expansion": 2,
    "num_selected_segments": 2,
}


MEMORY_NAMES = list(MEMORIES)
GATE_NAMES = [name for name in GATE_FUNCTIONS if name != CONSTANT]
ONE_MAP_MEMORIES = [name for name in MEMORY_NAMES if MEMORIES[name].num_maps == 1]  # soup is GRM for them
# what every test of a product takes; "content" has tests of its own, test_content_borders.py
SEGMENTATIONS = [name for name in CHOICES["segmentation"] if name != "content"]
# conftest.py asks for the interpreter
with_triton = pytest.mark.skipif(
    not HAS_TRITON or not triton_interpreted(), reason="needs Triton in its interpreter (TRITON_INTERPRET=1)"
)


def small_config(memory: str = "linear", **overrides) -> MCConfig:
    """A tiny config, with values narrower than keys where the memory allows it."""
    fields = SMALL | {"memory": memory} | overrides
    if "value_head_dim" in fields:
        return MCConfig(**fields)
    try:
        return MCConfig(**fields, value_head_dim=6)
    except ValueError as error:
        if "value_head_dim" not in str(error):
            raise
        return MCConfig(**fields)


def combinations(**axes: list) -> list[dict]:
    """The product of config fields, without the combinations that the config refuses."""
    kept = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        try:
            small_config(**fields)
        except ValueError:
            continue
        kept.append(fields)
    return kept


def accepts(**fields) -> bool:
    """Whether the config takes this combination."""
    return bool(combinations(**{name: [value] for name, value in fields.items()}))


def name_of(fields: dict) -> str:
    """A readable test id."""
    return "-".join(str(value) for value in fields.values())


def family(**axes: list) -> list[dict]:
    """memory x aggregation x state_init x segmentation, all that is implemented, unless `axes` say less. `none` is one
    endless segment, so it comes once per memory."""
    fields = {name: CHOICES[name] for name in ("aggregation", "state_init")} | {"segmentation": SEGMENTATIONS}
    every = combinations(**{"memory": MEMORY_NAMES, **fields} | axes)
    return [
        x
        for x in every
        if x["aggregation"] != "none" or (x["state_init"], x["segmentation"]) == ("independent", "constant")
    ]


@torch.no_grad()
def make_wild(model: nn.Module) -> nn.Module:
    """Weights with effect: a model as initialised is so tame that mistakes vanish in it."""
    for name, parameter in model.named_parameters():
        if name.endswith("_bias.bias"):  # decays between 0.5 and 0.99, not all the same
            kind = name.rsplit(".", 2)[1][0]
            start = next(m.gate_bias.get(kind, 0.0) for m in model.modules() if hasattr(m, "gate_bias"))
            parameter.copy_(torch.randn_like(parameter) + start / 2)
        elif parameter.dim() == 1:  # norms, biases of linear maps
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif "embed_tokens" in name:
            parameter.normal_()
        elif "u_proj" in name:  # gates that choose
            parameter.normal_(std=3 * parameter.shape[1] ** -0.5)
        elif "_proj" in name or "lm_head" in name or "score" in name:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(std=0.4)
    return model


def build(
    config: MCConfig, cls: type = MCForCausalLM, dtype: torch.dtype = torch.float32, seed: int = 0, wild: bool = True
) -> nn.Module:
    """A model in evaluation mode; `wild=False` leaves the weights as the library initialises them."""
    torch.manual_seed(seed)
    model = cls(config).to(dtype)
    return (make_wild(model) if wild else model).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference / largest magnitude; both may be all zero, and neither may hold a NaN."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all() and expected.isfinite().all()
    if not actual.numel():
        return 0.0
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4, what: str = "") -> None:
    error = relative_error(actual, expected) if expected.abs().max() > 0 else actual.abs().max().item()
    assert error < tolerance, f"{what} differs: {error:.2e}, allowed {tolerance:.0e}"
