"""Small models of other architectures, for the tests of conversion."""

import torch


IDS = torch.randint(3, 61, (2, 41), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
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
