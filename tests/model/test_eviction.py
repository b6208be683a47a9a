"""Who leaves a full cache, against a loop over tokens that is written from the rule and shares no code with it."""

import pytest
import torch

from helpers import build, name_of, small_config, tokens
from mc_transformers import MCCache
from mc_transformers.modeling_mc.segments import SegmentTable


SEGMENT, SLOTS = 4, 3
READS = [
    {"aggregation": "grm"},
    {"aggregation": "grm", "gate_function": "sigmoid"},
    {"aggregation": "ssc", "num_selected_segments": 1},  # who is never chosen receives nothing: the oldest of equals
    {"aggregation": "residual"},  # everyone receives the same
]


def gates_by_hand(config, u: torch.Tensor, online: torch.Tensor, kept: list[dict]) -> torch.Tensor:
    """What every kept segment receives from one token, mean over heads; u and the running descriptor `[H, d]`."""
    if config.aggregation == "residual":
        return torch.ones(len(kept))
    received = []
    for head in range(len(u)):
        own = u[head] @ online[head]
        past = torch.stack([u[head] @ each["descriptor"][head] for each in kept])
        if config.aggregation == "ssc":
            past = torch.where(past >= past.max(), past, -torch.inf)
        if config.gate_function == "sigmoid":
            received.append(past.sigmoid())
        else:
            received.append(torch.cat([past, own[None]]).softmax(0)[:-1])
    return torch.stack(received).mean(0)


def kept_by_hand(config, u: torch.Tensor, keys: torch.Tensor) -> list[list[dict]]:
    """Which segments are kept after every token of one row, from its `u` and keys `[T, H, d]`.

    When a segment finishes and all slots are taken, the one with the smallest mean of the gates that it received, over
    all tokens since it came and over heads, leaves; of equals the oldest.
    """
    kept, running, states = [], [], []
    for position in range(len(keys)):
        running.append(keys[position])
        if kept:
            gates = gates_by_hand(config, None if u is None else u[position], torch.stack(running).mean(0), kept)
            for each, gate in zip(kept, gates.tolist(), strict=True):
                each["received"].append(gate)
        if len(running) == SEGMENT:
            if len(kept) == SLOTS:
                means = [sum(each["received"]) / len(each["received"]) for each in kept]
                del kept[means.index(min(means))]  # they stand in the order in which they came
            number = position // SEGMENT
            kept.append({"number": number, "descriptor": torch.stack(running).mean(0), "received": []})
            running = []
        states.append([dict(each, received=sum(each["received"])) for each in kept])
    return states


@pytest.mark.parametrize("fields", READS, ids=name_of)
@torch.no_grad()
def test_who_is_read_least_leaves(fields: dict) -> None:
    """In one pass, in pieces and token by token; rows that begin at different places."""
    bounds = {"segment_size": SEGMENT, "max_cached_segments": SLOTS, "cache_eviction": "least_read"}
    model = build(small_config(**bounds, **fields), dtype=torch.float64)
    mixer, ids, mask = model.model.layers[0].mixer, tokens(2, 85), torch.ones(2, 85, dtype=torch.long)
    mask[0, :6] = 0
    inputs = []
    handle = mixer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    model(ids, attention_mask=mask)
    handle.remove()
    expected = []
    for x, real in zip(inputs[0], mask.bool(), strict=True):
        x = x[None, real]
        parts = mixer._project(x, SegmentTable.build(1, x.shape[1], SEGMENT, x.device), None)
        keys = parts.k if parts.source is None else parts.source
        expected.append(kept_by_hand(model.config, None if parts.u is None else parts.u[0], keys[0]))
    gaps = [state[-1]["number"] - state[0]["number"] >= SLOTS for rows in expected for state in rows if state]
    assert any(gaps) == (fields["aggregation"] != "residual"), "the oldest always left: no gate decided anything"

    for pieces in ([85], [30, 7, 48], [20] + [1] * 65):
        cache, done = MCCache(config=model.config), 0
        for piece in ids.split(pieces, 1):
            done += piece.shape[1]
            model(piece, attention_mask=mask[:, :done], cache=cache)
            held = cache.layers[0].tensors
            for row, position in enumerate(held["position"].tolist()):
                wanted = {each["number"]: each for each in expected[row][position - 1]}
                slots = {number: slot for slot, number in enumerate(held["segment"][row].tolist()) if number >= 0}
                assert slots.keys() == wanted.keys(), f"row {row} after {position} tokens"
                for number, slot in slots.items():
                    assert held["received"][row, slot].item() == pytest.approx(wanted[number]["received"], abs=1e-5)
                    if "summaries" in held:
                        torch.testing.assert_close(held["summaries"][row, slot, :, 0], wanted[number]["descriptor"])
