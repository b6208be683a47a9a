# Copyright 2026 the mc-transformers authors.
"""The Transformers model family: MCModel and its heads."""

import copy
import functools
import os
from dataclasses import replace

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration_mc import LAYER_TYPE, MCConfig
from ..kernels.shared.ops import unobserved
from .attention import make_rotary
from .block import MCDecoderLayer
from .border_rule import BorderRule, MCCausalLMOutputWithPast, MCOutputWithPast, check_stages
from .cache import MCCache, ModelRef
from .cache_layer import MCStaticCacheLayer, memory_caching_mask, memory_layer
from .compat import CACHE_NAME, cache_by_any_name, rename_cache
from .context_parallel import active_shards, check_shards
from .memories import Bias
from .mixer import MCMixer
from .read_gates import ReadGates
from .registration import register_decoder, register_layer_type, register_lora_targets
from .segments import SegmentTable, refuse_unmarked_packing
from .tensor_parallel import plan_heads, take_heads
from .transaction import one_forward, transaction_of


logger = logging.get_logger(__name__)

# what PEFT should target: every projection of the mixers, attention layers and MLPs
MC_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "u_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class MCPreTrainedModel(PreTrainedModel):
    """What the models of the family share: initial weights, and what Transformers asks of them.

    Gate biases, decay rates and M_0 (`Bias`) stay in fp32 when a model is loaded in half precision or cast to it.
    """

    config: MCConfig
    config_class = MCConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MCDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = False  # the cache can be rolled back
    _can_record_outputs = {"hidden_states": MCDecoderLayer, "attentions": ["self_attn", ReadGates]}

    def __init__(self, config: MCConfig, *args, **kwargs) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)
        register_decoder(type(config), MCModel)
        if type(self)._auto_class is not None:  # a repository's code, to be saved beside the decoder too
            MCModel.register_for_auto_class()
        register_lora_targets(MC_LORA_TARGETS)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh, *args, **kwargs):
        """Transformers' sharding of a model that has no weights yet; tensor parallel also deals out the heads of
        memory layers, where they can be told apart."""
        splits = mesh is not None and plan_heads(model, distributed_config.tp_size, distributed_config.tp_plan)
        model = super().maybe_distribute_model(model, distributed_config, mesh, *args, **kwargs)
        if splits:
            take_heads(model)
        return model

    def read_as(self, aggregation: str, num_selected_segments: int | None = None) -> "MCPreTrainedModel":
        """Read with the same weights by another rule, from now on: train dense, read sparse.

        A model that was trained with "grm" reads far fewer memories as "ssc" and may lose little (docs/choosing.md).
        `config.trained_as` keeps the rule of the training. Caches filled under another rule are refused.

        Args:
            aggregation: "grm", "soup" or "ssc" for a model with one of these; "residual" or "mean" for one without
                gates. num_selected_segments: k of "ssc"; None = as it is.

        Returns:
            the model itself.

        Raises:
            ValueError: the two rules need different parameters, or the config does not allow the other one.
        """
        config = self.config
        for rules in (("grm", "soup", "ssc"), ("residual", "mean")):
            if config.aggregation in rules and aggregation not in rules:
                raise ValueError(
                    f"read_as: `aggregation`={aggregation!r} is not possible for a model with "
                    f"aggregation={config.aggregation!r}, allowed: {', '.join(map(repr, rules))}"
                )
        if config.aggregation == "none" and aggregation != "none":
            raise ValueError(
                f"read_as: `aggregation`={aggregation!r} is not possible for a model with aggregation='none', "
                "allowed: load it with from_pretrained(folder, aggregation=...), which adds what is missing"
            )
        new = copy.deepcopy(config)
        new.trained_as = config.trained_as or config.aggregation
        new.aggregation = aggregation
        new.num_selected_segments = num_selected_segments or config.num_selected_segments
        if new.trained_as == aggregation:
            new.trained_as = None
        new.check()
        for name in ("aggregation", "num_selected_segments", "trained_as"):
            setattr(config, name, getattr(new, name))
        for module in self.modules():
            if isinstance(module, MCMixer):
                module.set_read_rule()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):  # torch's own: with initializer_range q, k and v all but vanish
            init.uniform_(module.weight, -(module.kernel_size[0] ** -0.5), module.kernel_size[0] ** -0.5)
        elif type(module).__name__ == "Qwen3NextRMSNorm":  # scales by 1 + weight
            init.zeros_(module.weight)
        elif hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights()  # memories, and their parts: each module with parameters of its own is asked

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *,
        with_code: bool | None = None,
        **kwargs,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, which see, and the code of the family: the folder also loads where this
        package is not installed, with `trust_remote_code=True`.

        Args:
            with_code: write the code. By default into every folder but those that the Trainer names `checkpoint-N`.
        """
        from ..hub.saving import save

        save(self, save_directory, is_main_process, state_dict, push_to_hub, with_code, **kwargs)

    def push_to_hub(self, repo_id: str, **options) -> CommitInfo | str:
        """`PreTrainedModel.push_to_hub`, which see, with the code of the family, and a card where the repository has
        none yet."""
        from ..hub.saving import push

        return push(self, repo_id, **options)


class MCModel(MCPreTrainedModel):
    """The decoder without a head: `[B, T]` tokens to `[B, T, hidden_size]`, in the dtype of the weights.

    Args:
        config: kind and size of the model; weights are random (`from_pretrained` loads trained ones).
    """

    def __init__(self, config: MCConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        chooses = config.segmentation == "content" and LAYER_TYPE in config.layer_types
        self.border_rule = BorderRule(config) if chooses else None
        self.layers = nn.ModuleList([MCDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_attention = any(kind != LAYER_TYPE for kind in config.layer_types)
        if self.has_attention:
            self.rotary_emb = make_rotary(config)
        self.gradient_checkpointing = False
        # loading in half precision keeps them, as casting does
        constants = [name for name, module in self.named_modules() if isinstance(module, Bias)]
        self._keep_in_fp32_modules_strict = {name.rpartition(".")[2] for name in constants}
        self.post_init()

    @property
    def _running(self) -> list[nn.Module]:
        """The layers that run: `generate(assistant_early_exit=n)` sets num_hidden_layers for its drafts."""
        return list(self.layers)[: self.config.num_hidden_layers]

    def _segment_table(
        self, inputs_embeds: torch.Tensor, mask: torch.Tensor | None, past: Cache | None, packed: dict, gates: bool
    ) -> SegmentTable | None:
        mixer = next((x.mixer for x in self._running if hasattr(x, "mixer")), None)  # of this stage of a pipeline
        if mixer is None:
            return None
        layer = None if past is None else mixer.cache_layer(past, inputs_embeds)  # before its positions are used
        table = mixer.table(inputs_embeds, mask, layer, **packed)
        if self.border_rule is not None:
            check_stages(self.layers)
            table = self.border_rule(inputs_embeds, table, {} if layer is None else layer.tensors)
        return replace(table, shards=active_shards(), gates={} if gates else None)

    @cache_by_any_name
    @merge_with_config_defaults
    @capture_outputs
    @one_forward
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of `input_ids` `[B, T]` (or `inputs_embeds` `[B, T, hidden]`).

        Args:
            input_ids: `[B, T]`, int64 or int32.
            inputs_embeds: `[B, T, hidden_size]` in the dtype of the weights, instead of `input_ids`.
            attention_mask: `[B, cached + T]`, or of the new tokens `[B, T]` in a model of memory layers only,
                0 = padding anywhere; or a dict keyed by layer type.
            position_ids: `[B, T]`, read by attention layers only: memory layers count each row's real tokens.
            cache: an `MCCache` or `DynamicCache(config=config)`, filled in place; `past_key_values` is its other name.
            use_cache: return a cache, a new `MCCache` if none is given; by default as the config says.
            kwargs: `cu_seq_lens_q` `[documents + 1]` or `seq_idx` `[1, T]`, borders of packed documents, as
                `DataCollatorWithFlattening` makes them; `output_hidden_states`; `output_attentions`.

        Returns:
            `last_hidden_state` `[B, T, hidden_size]`, and `cache` if a cache is used (before Transformers 5.24:
            `past_key_values`). With `output_attentions=True` also `attentions`, a tensor per layer: of an attention
            layer its weights `[B, H, T, keys]` (with `attn_implementation="eager"`), of a memory layer its gates
            `[B, H, T, S + 1]`, what each answer is multiplied with before they are added up. Column i is the row's (or
            the document's) segment i, 0 where it is not read; with logarithmic segments it is level i, the last
            finished segment of 2^i; the last column is the online memory. S is how many the last token of an unpadded
            row has behind it. Padding has zeros. Memories with elementwise gates of their own (`vector_read="add"`)
            show 1 for what is read; `aggregation="none"` has S = 0 and ones.

        Raises:
            ValueError: inputs that are missing, empty, of a wrong dtype or shape, or packed without borders.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        packed = {"cu_seq_lens": kwargs.get("cu_seq_lens_q"), "seq_idx": kwargs.get("seq_idx")}
        is_packed = any(value is not None for value in packed.values())
        checkpoints = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpoints and (use_cache or cache is not None):
            logger.warning_once("Caching is incompatible with gradient checkpointing: the cache is not used.")
            use_cache, cache = False, None
        if active_shards() is not None:
            absent = {"attention_mask": attention_mask, "cache": cache, "use_cache": use_cache}
            check_shards(self.config, inputs_embeds.shape[1], **absent, **packed)
        if use_cache and cache is None and not is_packed:
            cache = MCCache(config=self.config)
        if is_packed and cache is not None:
            raise ValueError("packed documents (`cu_seq_lens_q` / `seq_idx`) need a batch of one row and no cache")
        if not is_packed:
            refuse_unmarked_packing(position_ids, attention_mask)
        if cache is not None:
            self._check_cache(cache)
        self._check_mask(attention_mask, inputs_embeds, cache)

        masks = attention_mask if isinstance(attention_mask, dict) else None
        if masks is not None:
            mask = masks.get(LAYER_TYPE)
        else:
            mask = memory_caching_mask(self.config, inputs_embeds, attention_mask)
        asked = kwargs.get("output_attentions")
        asked = getattr(self.config, "output_attentions", False) if asked is None else asked
        table = self._segment_table(inputs_embeds, mask, cache, packed, bool(asked))
        if is_packed and table is not None:  # attention tells documents apart by positions, and without a mask only
            position_ids = table.token_position() if position_ids is None else position_ids
            attention_mask = None
        if masks is None:
            masks = self._attention_masks(inputs_embeds, attention_mask, cache, position_ids)
        if isinstance(cache, MCCache) and not torch.compiler.is_compiling():
            cache.filled_by = ModelRef(self)
        rope = None
        if self.has_attention:
            if position_ids is None:
                steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
                position_ids = (steps + self._seen(cache))[None]
            rope = self.rotary_emb and self.rotary_emb(inputs_embeds, position_ids)

        hidden_states = inputs_embeds
        if not torch.compiler.is_compiling() and (transaction := transaction_of(cache)) is not None:
            transaction.write()
        for kind, layer in zip(self.config.layer_types, self._running, strict=False):
            hidden_states = layer(
                hidden_states,
                segment_table=table,
                attention_mask=masks.get(kind),
                position_embeddings=rope,
                cache=cache,
                **kwargs,
            )
        loss = None if table is None else table.border_loss
        out = {"last_hidden_state": self.norm(hidden_states), CACHE_NAME: cache}
        return MCOutputWithPast(border_loss=loss, **out)

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """`[B, T, hidden]` of whichever is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
        if inputs_embeds is None:
            if input_ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"`input_ids` must be torch.int64 or torch.int32, got {input_ids.dtype}")
            if input_ids.ndim != 2:
                raise ValueError(f"`input_ids` must have shape (rows, tokens), got {tuple(input_ids.shape)}")
            if not input_ids.shape[0]:
                raise ValueError(f"`input_ids` has no rows, allowed: at least one, got {tuple(input_ids.shape)}")
            return self.embed_tokens(input_ids)
        if inputs_embeds.ndim != 3 or not len(inputs_embeds) or inputs_embeds.shape[-1] != self.config.hidden_size:
            shape = f"(rows, tokens, {self.config.hidden_size})"
            raise ValueError(f"`inputs_embeds` must have shape {shape}, got {tuple(inputs_embeds.shape)}")
        return inputs_embeds

    def _check_cache(self, past: Cache) -> None:
        mixers = [layer.mixer for layer in self._running if hasattr(layer, "mixer")]
        seen = [memory_layer(past, mixer.layer_idx).num_tokens for mixer in mixers]
        if len({count for count in seen if isinstance(count, int)}) > 1:  # those of a static cache are on the device
            raise ValueError(f"`cache` is broken: its layers have read {seen} tokens, allowed: all the same number")

    def _seen(self, past: Cache | None) -> int | torch.Tensor:
        """Tokens in the cache, by the first layer that this stage of a pipeline has."""
        if past is None:
            return 0
        first = next(i for i, layer in enumerate(self.layers) if isinstance(layer, MCDecoderLayer))
        return past.get_seq_length(first)

    def _attention_masks(self, inputs_embeds, attention_mask, cache, position_ids) -> dict:
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: make(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
            )
            for kind, make in makers.items()
            if kind in self.config.layer_types
        }

    def _check_mask(self, mask, inputs_embeds: torch.Tensor, past: Cache | None) -> None:
        """Memory layers read padding masks only; a mask of another length would be cut to a wrong part of it."""
        if not isinstance(mask, torch.Tensor) or LAYER_TYPE not in self.config.layer_types:
            return
        if unobserved():
            return
        rows, num_tokens = inputs_embeds.shape[:2]
        allowed = [(rows, int(self._seen(past)) + num_tokens)]
        if not self.has_attention:
            allowed.append((rows, num_tokens))
        if tuple(mask.shape) not in allowed:
            shapes = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
            raise ValueError(f"`attention_mask` must have shape {shapes}, got {tuple(mask.shape)}")


class MCForCausalLM(MCPreTrainedModel, GenerationMixin):
    """MCModel with a language-modelling head, and `generate`, which also takes `prefix_store`: a `PrefixStore` that
    knows beginnings of prompts.

    Args:
        config: kind and size of the model; weights are random (`from_pretrained` loads trained ones).

    Example:
        >>> model = MCForCausalLM(MCConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        >>> model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=20).shape
        torch.Size([1, 25])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MCConfig) -> None:
        super().__init__(config)
        self.model = MCModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @cache_by_any_name
    @can_return_tuple
    @one_forward
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token and, with `labels`, the loss. Other arguments and errors: see `MCModel.forward`.

        Args:
            labels: `[B, T]` int64, usually `input_ids`: they are shifted here; -100 = ignored.
            logits_to_keep: how many of the last tokens get logits (0 = all), or their positions in a tensor.
            kwargs: `num_items_in_batch` divides the summed loss by this number and not by that of the labels.

        Returns:
            `logits` `[B, T, vocab_size]` in the dtype of the weights, `loss` (a fp32 scalar) with `labels`,
            `cache` if a cache is used.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and outputs.border_loss is not None:
                loss = loss + self.config.border_loss_weight * outputs.border_loss
        return MCCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            border_loss=outputs.border_loss,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, *args, prefix_store=None, **kwargs):
        kwargs = rename_cache(kwargs, CACHE_NAME)
        if prefix_store is not None:
            kwargs |= prefix_store.prepare(self, inputs, kwargs, generation_config or self.generation_config)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """Refuses a cache that has read all of the prompt: Transformers would read the prompt into it once more."""
        past, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        seen = 0 if past is None else int(past.get_seq_length())
        embeds = model_kwargs.get("inputs_embeds")
        given = (input_ids if embeds is None else embeds).shape[1]
        given = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[-1]
        if 0 < given <= seen:
            raise ValueError(
                f"`cache` has read {seen} tokens: `generate` needs `input_ids` of all of them and of at "
                f"least one more, got {given}"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        """Begins with an empty cache, since Transformers hands over the whole text at first. Afterwards the cache goes
        on without a record, which would keep the input of every later token."""
        past = kwargs.get(CACHE_NAME)
        if past is not None and int(past.get_seq_length()):
            raise ValueError(
                "`prompt_lookup_num_tokens` and `assistant_model` cannot go on from `cache` that have read "
                "something: leave them out, or begin with an empty cache"
            )
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            for layer in getattr(past, "layers", ()):
                if hasattr(layer, "record_past"):
                    layer.record_past = False


class MCForSequenceClassification(GenericForSequenceClassification, MCPreTrainedModel):
    """MCModel with `num_labels` scores `[B, num_labels]` of the last token of every row that is not padding
    (`pad_token_id`)."""


class MCForTokenClassification(GenericForTokenClassification, MCPreTrainedModel):
    """MCModel with `num_labels` scores `[B, T, num_labels]` of every token."""


class MCForQuestionAnswering(GenericForQuestionAnswering, MCPreTrainedModel):
    """MCModel with two scores `[B, T]` of every token: start and end of an answer."""


register_layer_type(memory_caching_mask, MCStaticCacheLayer)
