# Copyright 2026 the mc-transformers authors.
"""The teacher, and models that are the teacher but for some layers."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ... import MCConfig, MCForCausalLM
from ...configuration_mc import LAYER_TYPE
from ...hub.loading import load_config, load_model
from ...modeling_mc.mixer import MCMixer
from ..checkpoint import open_checkpoint
from ..convert import U_PROJ, convert
from ..convert import new_mixer as untrained_mixer
from ..source import refuse
from ..sources.llama import repeat_heads
from .options import Options, wrong


SPREAD = (1.0, 6.0)  # logits of the decay per token, from the first head to the last: 0.73 to 0.998


def prepare_teacher(source: str, folder: Path) -> Path:
    """The folder of the teacher as a model of this family: `source` itself, or `folder`, to which it is converted.

    Raises:
        FileNotFoundError: there is none. ValueError: another architecture, or layers that are not attention.
    """
    place = Path(source)
    if not place.exists():
        raise FileNotFoundError(f"the teacher {source} does not exist (download a Hub repository first)")
    if place.is_dir() and open_checkpoint(place).config.get("model_type") == MCConfig.model_type:
        folder = place
    elif not folder.exists():
        convert(place, folder, dtype="float32")
    config = load_config(str(folder))
    if set(config.layer_types) != {"full_attention"}:
        refuse("layers that are not attention (layer_types)", sorted(set(config.layer_types)), "full_attention")
    return folder


def load_teacher(folder: Path, device: str) -> MCForCausalLM:
    """In fp32 and evaluation mode, without gradients."""
    return load_model(str(folder), "float32", device, head="MCForCausalLM").requires_grad_(False)


def check_layers(layers: Iterable[int], config: MCConfig) -> None:
    """
    Raises:
        ValueError: there is no such layer.
    """
    if bad := [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]:
        raise wrong("layers", bad, f"numbers from 0 to {config.num_hidden_layers - 1}")


def student_config(teacher: MCConfig, layers: Iterable[int], options: Options) -> MCConfig:
    """Of a model whose `layers` are memory layers, and whose others may attend to a window only."""
    other = "full_attention" if options.window is None else "sliding_attention"
    kinds = [LAYER_TYPE if i in layers else other for i in range(teacher.num_hidden_layers)]
    fields = {"layer_types": kinds, "sliding_window": options.window, "qkv_bias": teacher.attention_bias}
    rotary = teacher.rope_parameters.get("rope_type", "default") == "default"  # memory layers know no other kind
    return MCConfig.from_dict(teacher.to_dict() | fields | options.fields(rotary))


@torch.no_grad()
def new_mixer(teacher: MCForCausalLM, layer: int, options: Options) -> MCMixer:
    """A mixer with the projections of an attention layer; what that does not have is as in a new model.

    Raises:
        ValueError: the attention layer has a bias of its output, which a mixer does not have.
    """
    attention, sizes = teacher.model.layers[layer].self_attn, teacher.config.to_dict()
    if attention.o_proj.bias is not None and attention.o_proj.bias.any():
        refuse("a bias of the output, which a memory layer would have to keep (attention_bias)", True, "False")
    mixer = untrained_mixer(student_config(teacher.config, [layer], options), layer).to(teacher.device)
    plain = replace(options, aggregation="none")  # the same random numbers, whatever else is drawn for a read rule
    mixer.load_state_dict(untrained_mixer(student_config(teacher.config, [layer], plain), layer).state_dict(), False)
    for name, target in mixer.named_parameters():
        if name.startswith(("q_proj", "o_proj")):
            target.copy_(attention.get_parameter(name))
        elif name.startswith(("k_proj", "v_proj")):
            target.copy_(*repeat_heads(attention.get_parameter(name), sizes))
        elif f".mixer.{name}".endswith(U_PROJ):
            target.zero_()
    if options.memory == "gated_linear":  # heads that forget within some tokens, and heads that hardly do
        mixer.a_proj.weight.zero_()
        mixer.a_bias.bias.copy_(torch.linspace(*SPREAD, mixer.num_heads))
    return mixer


def as_memory_layer(layer: nn.Module, mixer: MCMixer) -> nn.Module:
    """A decoder layer with a mixer in the place of its attention; everything else is shared with `layer`."""
    new = copy.copy(layer)
    new._modules = {name: part for name, part in layer._modules.items() if name != "self_attn"}
    new.mixer, new.layer_type = mixer, LAYER_TYPE
    return new


@contextmanager
def running(model: MCForCausalLM, layers: list[nn.Module]) -> Iterator[MCForCausalLM]:
    """`model` with other decoder layers: fewer, or some with a mixer."""
    config, inner = model.config, model.model
    before = inner.layers, config.layer_types, config.num_hidden_layers
    inner.layers, config.num_hidden_layers = nn.ModuleList(layers), len(layers)
    config.layer_types = [layer.layer_type for layer in layers]
    try:
        yield model
    finally:
        inner.layers, config.layer_types, config.num_hidden_layers = before


def make_student(teacher: MCForCausalLM, mixers: dict[int, MCMixer], options: Options) -> MCForCausalLM:
    """The hybrid, with weights of its own."""
    config = student_config(teacher.config, mixers, options)
    student = MCForCausalLM(config).to(teacher.device)
    gone = tuple(f"model.layers.{layer}.self_attn." for layer in mixers)
    weights = {name: x for name, x in teacher.state_dict().items() if not name.startswith(gone)}
    for layer, mixer in mixers.items():
        weights |= {f"model.layers.{layer}.mixer.{name}": x for name, x in mixer.state_dict().items()}
    student.load_state_dict(weights)
    return student.eval()
