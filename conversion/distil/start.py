# Copyright 2026 the mc-transformers authors.
"""Where mixers start, in closed form, and which layers they replace at the least cost."""

import torch
from tqdm import tqdm

from ... import MCForCausalLM
from ...modeling_mc.mixer import MCMixer
from .activations import activations
from .corpus import Corpus
from .end_to_end import divergence, top_logits
from .options import Options
from .student import as_memory_layer, new_mixer, running


FIT_WINDOWS = 8  # texts that the output projections are fitted on
CHOICE_TOKENS = 2048  # held-out tokens on which layers are compared
RIDGE = 1e-4  # relative to the mean square of the memory's answers


def raw_answers(mixer: MCMixer, x: torch.Tensor) -> torch.Tensor:
    """What the output projection gets, `[B, T, heads * dv]`, of the mixer's input `[B, T, hidden]`."""
    found = []
    with mixer.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0])):
        mixer(x, mixer.table(x))
    return found[0]


@torch.no_grad()
def start_mixers(teacher: MCForCausalLM, layers: list[int], corpus: Corpus, options: Options) -> dict[int, MCMixer]:
    """Mixers with the teacher's projections of q, k and v, and the output projection that fits best.

    The answers x of the memory are not those of softmax attention, in size nor in direction. What the layer
    adds to the residual stream is W x, so the best W is a least-squares problem: W = Y X^T (X X^T + r I)^-1, with the
    attention layer's answers Y on the same text.
    """
    mixers = {layer: new_mixer(teacher, layer, options) for layer in layers}
    sums = dict.fromkeys(layers, 0)
    windows = range(min(FIT_WINDOWS, len(corpus.order)))
    parts = activations(teacher, layers, corpus, windows, options)
    for pairs in tqdm(parts, desc="start", total=-(-len(windows) // options.batch), unit="batch"):
        for layer, (x, y) in pairs.items():
            answers = raw_answers(mixers[layer], x.float())
            both = torch.cat([answers, y], -1).flatten(0, 1).double()
            sums[layer] = sums[layer] + both[:, : answers.shape[-1]].mT @ both
    for layer, mixer in mixers.items():
        width = len(sums[layer])
        squares, products = sums[layer].split([width, sums[layer].shape[1] - width], 1)
        squares.diagonal().add_(RIDGE * squares.diagonal().mean())
        mixer.o_proj.weight.copy_(torch.linalg.solve(squares, products).mT)
    return mixers


@torch.no_grad()
def errors(teacher: MCForCausalLM, mixers: dict[int, MCMixer], corpus: Corpus, options: Options) -> dict[int, float]:
    """By layer, the squared error of a mixer's answers relative to the square of the attention layer's."""
    wrong, total = dict.fromkeys(mixers, 0.0), dict.fromkeys(mixers, 0.0)
    windows = range(min(options.eval_windows, len(corpus.order)))
    for pairs in activations(teacher, list(mixers), corpus, windows, options):
        for layer, (x, y) in pairs.items():
            with options.autocast():
                answer = mixers[layer](x, mixers[layer].table(x))
            wrong[layer] += (answer.float() - y.float()).square().sum().item()
            total[layer] += y.float().square().sum().item()
    return {layer: wrong[layer] / total[layer] for layer in mixers}


@torch.no_grad()
def single_layer_costs(teacher: MCForCausalLM, mixers: dict[int, MCMixer], corpus: Corpus, options: Options) -> dict:
    """By layer, KL in nats per token from the teacher to the teacher with this one mixer, on held-out text.

    Layers below the one that is replaced need not run again.
    """
    count = min(len(corpus.order), max(1, CHOICE_TOKENS // corpus.length))
    costs, layers, kinds = dict.fromkeys(mixers, 0.0), list(teacher.model.layers), range(count)
    with tqdm(total=count * len(mixers), desc="choose layers", unit="layer") as bar:
        for number in kinds:
            ids = corpus.batch([number], options.device)
            with options.autocast():
                states = teacher.model(ids, use_cache=False, output_hidden_states=True)
                target = top_logits(teacher.lm_head, states.last_hidden_state, options.top_k)
                for layer, mixer in mixers.items():
                    rest = [as_memory_layer(layers[layer], mixer), *layers[layer + 1 :]]
                    with running(teacher, rest):
                        hidden = teacher.model(inputs_embeds=states.hidden_states[layer], use_cache=False)
                    cost = divergence(teacher.lm_head, hidden.last_hidden_state, *target)
                    costs[layer] += cost.item() / count
                    bar.update()
    return costs
