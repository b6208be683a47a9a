"""Small models of other architectures, for the tests of conversion."""

import json

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F


IDS = torch.randint(3, 61, (2, 41), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 61, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@torch.no_grad()
def make_source(cls: type, config, folder, untouched: tuple[str, ...] = ("A_log",)):
    """A model of `cls` with weights that have effect, saved to `folder`.

    They are not larger because the sources' own rounding (in chunks against token by token) reaches 2e-4 with 0.3.
    """
    torch.manual_seed(0)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.15)
        elif not name.endswith(untouched):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def make_kind(kinds: dict, folder, kind: str, **fields):
    """`make_source` of one of `kinds` (class, class of its config, fields), with other `fields`."""
    cls, config, values = kinds[kind]
    return make_source(cls, config(**values | fields), folder)


def train(model, steps: int = 6) -> list[float]:
    """Losses of some steps on the same tokens."""
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), 3e-3), []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------------- flash-linear-attention
FLA = SIZES | {"num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 32, "norm_eps": 1e-5}


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def named(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


class FlaModel(nn.Module):
    """A model from its equations, one token after the other, under the names of the library."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.c = c
        width, inner = c["hidden_size"], c["intermediate_size"]

        def layer() -> nn.Module:
            mlp = named(gate_proj=linear(width, inner), up_proj=linear(width, inner), down_proj=linear(inner, width))
            norms = {name: nn.RMSNorm(width, eps=c["norm_eps"]) for name in ("attn_norm", "mlp_norm")}
            return named(attn=self.mixer(), mlp=mlp, **norms)

        layers = nn.ModuleList([layer() for _ in range(c["num_hidden_layers"])])
        self.model = named(
            embeddings=nn.Embedding(c["vocab_size"], width), layers=layers, norm=nn.RMSNorm(width, eps=c["norm_eps"])
        )
        self.lm_head = linear(width, c["vocab_size"])
        if c.get("tie_word_embeddings"):
            self.lm_head.weight = self.model["embeddings"].weight

    def mixer(self) -> nn.Module:
        """The modules of one mixer."""
        raise NotImplementedError

    def mix(self, attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The answers `[B, T, hidden]` of one mixer."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model["embeddings"](ids)
        for layer in self.model["layers"]:
            x = x + self.mix(layer["attn"], layer["attn_norm"](x))
            y, mlp = layer["mlp_norm"](x), layer["mlp"]
            x = x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return self.lm_head(self.model["norm"](x))


class FlaLinear(FlaModel):
    """LinearAttention with the identity as feature map, and RetNet."""

    def mixer(self) -> nn.Module:
        c, self.retnet = self.c, self.c["model_type"] == "retnet"
        width, keys, values = (int(c["hidden_size"] * by) for by in (1, c["expand_k"], c["expand_v"]))
        norm = nn.RMSNorm(values // c["num_heads"], eps=c["norm_eps"])
        norm = {"g_norm_swish_gate" if self.retnet else "norm": norm}
        gate = {"g_proj": linear(width, values)} if self.retnet else {}
        return named(
            q_proj=linear(width, keys),
            k_proj=linear(width, keys),
            v_proj=linear(width, values),
            o_proj=linear(values, width),
            **norm,
            **gate,
        )

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


class FlaGatedDeltaNet(FlaModel):
    """Gated DeltaNet: S <- a S, then S <- S + b k (v - S^T k)^T, read as S^T q / sqrt(d)."""

    def mixer(self) -> nn.Module:
        c, width = self.c, self.c["hidden_size"]
        heads, wide = c["num_v_heads"] or c["num_heads"], int(c["head_dim"] * c["expand_v"])
        sizes = {"q": c["num_heads"] * c["head_dim"], "k": c["num_heads"] * c["head_dim"], "v": heads * wide}
        modules = {f"{name}_proj": linear(width, size) for name, size in sizes.items()}
        modules |= {name: linear(width, heads) for name in ("a_proj", "b_proj")}
        modules["o_proj"] = linear(sizes["v"], width)
        if c["use_short_conv"]:
            for name, size in sizes.items():
                modules[f"{name}_conv1d"] = nn.Conv1d(size, size, c["conv_size"], groups=size, bias=False)
        if c["use_gate"]:
            modules["g_proj"] = linear(width, sizes["v"])
        attn = named(**modules, o_norm=nn.RMSNorm(wide, eps=c["norm_eps"]))
        attn.A_log = nn.Parameter(torch.linspace(0.5, 8, heads).log())
        attn.dt_bias = nn.Parameter(torch.linspace(-4, -1, heads))
        return attn

    def part(self, attn: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values `[B, T, H, d]`."""
        y = attn[f"{name}_proj"](x)
        if self.c["use_short_conv"]:
            y = attn[f"{name}_conv1d"](F.pad(y.mT, (self.c["conv_size"] - 1, 0))).mT
        if name == "v":
            return F.silu(y).unflatten(-1, (attn.A_log.numel(), -1))
        y = F.silu(y).unflatten(-1, (self.c["num_heads"], -1))
        y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        return y.repeat_interleave(attn.A_log.numel() // self.c["num_heads"], -2)

    def mix(self, attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.part(attn, name, x) for name in "qkv")
        decay = (-attn.A_log.exp() * F.softplus(attn["a_proj"](x) + attn.dt_bias)).exp()
        strength = attn["b_proj"](x).sigmoid() * (2 if self.c["allow_neg_eigval"] else 1)
        state, out = torch.zeros(*k.shape[::2], k.shape[-1], v.shape[-1]), []
        for t in range(x.shape[1]):
            state = decay[:, t, :, None, None] * state
            known = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            change = strength[:, t, :, None] * (v[:, t] - known)
            state = state + k[:, t, :, :, None] * change[:, :, None]
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * q.shape[-1] ** -0.5)
        out = attn["o_norm"](torch.stack(out, 1))
        if self.c["use_gate"]:
            out = out * F.silu(attn["g_proj"](x)).unflatten(-1, out.shape[-2:])
        return attn["o_proj"](out.flatten(-2))


DELTA = {
    "model_type": "gated_deltanet",
    "head_dim": 8,
    "expand_v": 1.5,
    "num_v_heads": None,
    "conv_size": 4,
    "use_gate": True,
    "use_short_conv": True,
    "allow_neg_eigval": False,
}
FLA_KINDS = {
    "linear_attn": FLA | {"model_type": "linear_attn", "feature_map": "identity", "expand_k": 1.0, "expand_v": 1.0},
    "retnet": FLA | {"model_type": "retnet", "expand_k": 1.0, "expand_v": 2.0},
    "gated_deltanet": FLA | DELTA,
}


@torch.no_grad()
def make_fla(kind: str, folder, **fields) -> FlaModel:
    """A model of `FLA_KINDS` with weights that have effect, saved to `folder`."""
    torch.manual_seed(0)
    config = FLA_KINDS[kind] | fields
    model = (FlaGatedDeltaNet if kind == "gated_deltanet" else FlaLinear)(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.5 if "conv1d" in name else 0.15)
        elif not name.endswith(("A_log", "dt_bias")):
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = model.state_dict()
    if config.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return model
