"""Variants of texts to train on: tokens left out, spans in another order, and mixtures of two.

All draws are from torch's global source, which a run seeds.
"""

import torch
from torch import Tensor


def real(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return which tokens are text and not what fills a row: bool, of the shape of the tokens.

    Parameters
    ----------
    tokens
        Token ids, (batch, tokens).
    lengths
        Tokens of each text, (batch, 1).
    """
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths


def shuffle_spans(tokens: Tensor, lengths: Tensor, span: int) -> Tensor:
    """Return texts with their spans of so many tokens in another order; the last span may be shorter.

    Parameters
    ----------
    tokens, lengths
        As of `real`.
    span
        Tokens of a span; 0: texts stay as they are.
    """
    if span == 0:
        return tokens
    places = torch.arange(tokens.shape[1], device=tokens.device)
    spans = -(-tokens.shape[1] // span)
    keys = torch.rand((len(tokens), spans), device=tokens.device)
    # What fills a row stays behind the text.
    order = torch.where(real(tokens, lengths), keys[:, places // span], 2.0)
    return tokens.gather(1, order.argsort(dim=1, stable=True))


def drop_tokens(mask: Tensor, share: float) -> Tensor:
    """Return which tokens are left when each is left out with a probability; one of each text stays.

    Parameters
    ----------
    mask
        Which tokens are text, bool, (batch, tokens).
    """
    if share == 0:
        return mask
    draws = torch.rand(mask.shape, device=mask.device)
    draws = torch.where(mask, draws, -1.0)
    highest = torch.nn.functional.one_hot(draws.argmax(1), mask.shape[1]).bool()
    return mask & ((draws >= share) | highest)


def mixing_share(alpha: float) -> float:
    """Return λ of a mixture, drawn from Beta(α, α); 1 if α is 0."""
    if alpha == 0:
        return 1.0
    return float(torch.distributions.Beta(alpha, alpha).sample())
