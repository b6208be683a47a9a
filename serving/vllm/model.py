# Copyright 2026 the mc-transformers authors.
"""MCForCausalLM for vLLM: the mixers of the package, and vLLM's own layers around them."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from ...configuration_mc import LAYER_TYPE, MCConfig
from .attention import MCAttention
from .layer import PagedMixer
from .limits import check


class MCMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MCConfig, prefix: str) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.gate_proj = ColumnParallelLinear(*sizes, prefix=f"{prefix}.gate_proj")
        self.up_proj = ColumnParallelLinear(*sizes, prefix=f"{prefix}.up_proj")
        sizes = (config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.down_proj = RowParallelLinear(*sizes, prefix=f"{prefix}.down_proj")
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)[0]) * self.up_proj(x)[0])[0]


class MCDecoderLayer(nn.Module):
    """Norm, mixer or attention, norm, MLP, as `modeling_mc.block` has them."""

    def __init__(self, config: MCConfig, index: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        is_memory = config.layer_types[index] == LAYER_TYPE
        if is_memory:
            self.mixer = PagedMixer(config, index, vllm_config, f"{prefix}.mixer")
        else:
            self.self_attn = MCAttention(config, index, vllm_config, f"{prefix}.self_attn")
        self.post_norm = not is_memory and config.attention_norm == "post"
        self.mlp = MCMLP(config, f"{prefix}.mlp") if config.intermediate_size else None
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.intermediate_size:
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        def mix(y: torch.Tensor) -> torch.Tensor:
            return self.mixer(y) if hasattr(self, "mixer") else self.self_attn(y, positions)

        x = self._residual(self.input_layernorm, mix, x)
        return x if self.mlp is None else self._residual(self.post_attention_layernorm, self.mlp, x)

    def _residual(self, norm: nn.Module, function: Callable, x: torch.Tensor) -> torch.Tensor:
        return x + (norm(function(x)) if self.post_norm else function(norm(x)))


class MCModel(nn.Module):
    """The decoder without a head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [MCDecoderLayer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)


class MCForCausalLM(nn.Module):
    """What vLLM runs: hidden states and logits of the tokens of all requests of a step, one after the other.

    Raises:
        ValueError: something that is not supported, see `limits.check`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check(vllm_config)
        self.config = config = vllm_config.model_config.hf_config
        self.model = MCModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden]` of `input_ids` `[tokens]` or `inputs_embeds` `[tokens, hidden]`."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(x, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take over the tensors of a checkpoint, of memory layers this rank's heads; returns the filled names.

        Raises:
            KeyError: a tensor that the model does not have.
        """
        parameters, filled = dict(self.named_parameters()), set()
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") and ".self_attn." in name:
                part = name.split(".")[-2][0]
                name = name.replace(f"{part}_proj", "qkv_proj")
                parameters[name].weight_loader(parameters[name], weight, part)
            elif ".mixer." in name:
                parameters[name].data.copy_(_own_heads(weight, parameters[name]))
            else:
                getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], weight)
            filled.add(name)
        return filled


def _own_heads(weight: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a mixer's tensor: heads lie one after the other in the dimension that is split."""
    for dim, (full, own) in enumerate(zip(weight.shape, parameter.shape, strict=True)):
        if full != own:
            weight = weight.narrow(dim, get_tensor_model_parallel_rank() * own, own)
    return weight
