"""LinearAttention and RetNet in the layout of flash-linear-attention, against their equations written out."""

import json

import pytest
import torch
from conversion_sources import IDS, SIZES, TOKENS, train
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mc_transformers import MCForCausalLM
from mc_transformers.conversion.convert import convert


FLA = SIZES | {"num_hidden_layers": 2, "num_heads": 2, "expand_k": 1.0, "intermediate_size": 32, "norm_eps": 1e-5}
KINDS = {
    "linear_attn": FLA | {"model_type": "linear_attn", "feature_map": "identity", "expand_v": 1.0},
    "retnet": FLA | {"model_type": "retnet", "expand_v": 2.0},
}


def named(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


class Written(nn.Module):
    """The model from its equations, one token after the other, under the names of the library."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.c, self.retnet = c, c["model_type"] == "retnet"
        width, heads, inner = c["hidden_size"], c["num_heads"], c["intermediate_size"]
        keys, values = int(width * c["expand_k"]), int(width * c["expand_v"])

        def linear(a: int, b: int) -> nn.Module:
            return nn.Linear(a, b, bias=False)

        def layer() -> nn.Module:
            norm = {"g_norm_swish_gate" if self.retnet else "norm": nn.RMSNorm(values // heads, eps=c["norm_eps"])}
            gate = {"g_proj": linear(width, values)} if self.retnet else {}
            attn = named(q_proj=linear(width, keys), k_proj=linear(width, keys), v_proj=linear(width, values),
                         o_proj=linear(values, width), **norm, **gate)  # fmt: skip
            mlp = named(gate_proj=linear(width, inner), up_proj=linear(width, inner), down_proj=linear(inner, width))
            norms = {name: nn.RMSNorm(width, eps=c["norm_eps"]) for name in ("attn_norm", "mlp_norm")}
            return named(attn=attn, mlp=mlp, **norms)

        layers = nn.ModuleList([layer() for _ in range(c["num_hidden_layers"])])
        self.model = named(embeddings=nn.Embedding(c["vocab_size"], width), layers=layers,
                           norm=nn.RMSNorm(width, eps=c["norm_eps"]))  # fmt: skip
        self.lm_head = linear(width, c["vocab_size"])

    def turn(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """Pairs (i, i + d/2) of x `[B, H, d]` turned by t times their rate."""
        if not self.retnet:
            return x
        pairs = torch.complex(*x.chunk(2, -1))
        rate = 10000.0 ** -(torch.arange(pairs.shape[-1]) / pairs.shape[-1])
        pairs = pairs * torch.polar(torch.ones_like(rate), t * rate)
        return torch.cat([pairs.real, pairs.imag], -1)

    def mix(self, attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (attn[f"{n}_proj"](x).unflatten(-1, (self.c["num_heads"], -1)) for n in "qkv")
        head = torch.arange(self.c["num_heads"])
        decay = 1 - 2.0 ** (-5.0 - head) if self.retnet else torch.ones(len(head))
        state, out = 0, []
        for t in range(x.shape[1]):
            key, query = self.turn(k[:, t], t), self.turn(q[:, t], t)
            state = decay[:, None, None] * state + key[..., :, None] * v[:, t, :, None, :]
            out.append((query[..., None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5)
        out = torch.stack(out, 1)
        if not self.retnet:
            return attn["o_proj"](attn["norm"](out).flatten(-2))
        gate = F.silu(attn["g_proj"](x).unflatten(-1, (self.c["num_heads"], -1)))
        return attn["o_proj"]((attn["g_norm_swish_gate"](out) * gate).flatten(-2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model["embeddings"](ids)
        for layer in self.model["layers"]:
            x = x + self.mix(layer["attn"], layer["attn_norm"](x))
            y, mlp = layer["mlp_norm"](x), layer["mlp"]
            x = x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return self.lm_head(self.model["norm"](x))


@torch.no_grad()
def make(kind: str, folder, **fields) -> Written:
    torch.manual_seed(0)
    config = KINDS[kind] | fields
    model = Written(config)
    for parameter in model.parameters():
        parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_source(tmp_path, kind):
    theirs = make(kind, tmp_path / "source")
    ours = MCForCausalLM.from_pretrained(convert(tmp_path / "source", tmp_path / "ours")).eval()
    assert (ours(IDS).logits - theirs(IDS)).abs().max() < 1e-4
    ids = IDS
    for _ in range(TOKENS["max_new_tokens"]):
        ids = torch.cat([ids, theirs(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(ours.generate(IDS, **TOKENS | {"eos_token_id": None}), ids)


@pytest.mark.parametrize("aggregation", ["mean", "grm", "ssc"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_and_trains_with_segments(tmp_path, kind, aggregation):
    theirs = make(kind, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", aggregation=aggregation, segment_size=8)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert (ours.eval()(IDS[:, :8]).logits - theirs(IDS[:, :8])).abs().max() < 1e-4
    losses = train(ours)
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_linear_attention_is_the_same_in_independent_segments_that_are_added_up(tmp_path):
    """Rotations and decays apart, the sum of all segments' memories is one endless memory (eq. 13)."""
    theirs = make("linear_attn", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", aggregation="residual", segment_size=8)
    ours = MCForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (ours(IDS).logits - theirs(IDS)).abs().max() < 1e-4


REFUSED = [
    ("linear_attn", {"feature_map": "elementwise_product"}), ("linear_attn", {"norm_q": True}),
    ("linear_attn", {"norm_feature_map": True}), ("linear_attn", {"num_kv_heads": 1}),
    ("retnet", {"attn": {"layers": [0]}}), ("retnet", {"use_short_conv": True}),
    ("retnet", {"use_output_gate": False}), ("retnet", {"feature_map": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), REFUSED, ids=str)
def test_missing_pieces_are_named(tmp_path, kind, fields):
    make(kind, tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=f"this checkpoint has .*{next(iter(fields))}|a feature map"):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_default_feature_map_is_not_taken_for_the_identity(tmp_path):
    make("linear_attn", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["feature_map"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="elementwise_product"):
        convert(tmp_path / "source", tmp_path / "ours")
