"""Draw tokens from logits: temperature, filters, and one uniform number per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import OpdlabError
from opdlab.models.precision import without_autocast


class Drawn(NamedTuple):
    """Tokens that were drawn.

    Attributes:
        token: Token ids `[n]`.
        logp: Their log-probs at temperature 1 without any filter, in nats, `[n]`.
        entropy: The entropies at temperature 1 without any filter, in nats, `[n]`.
    """

    token: Tensor
    logp: Tensor
    entropy: Tensor


def draw(
    logits: Tensor, uniform: Tensor, config: SamplingConfig, without: Tensor | None = None
) -> Drawn:
    """Sample by inverse CDF; a token without probability is never drawn.

    Nothing in it waits for the device, so that a CUDA graph can hold it.

    Args:
        logits: `[n, V]`.
        uniform: Numbers from 0 to 1, `[n]`.
        config: Temperature and which tokens are kept.
        without: Ids of tokens that are not drawn; None for none.

    Returns:
        The tokens. Log-prob and entropy are NaN or infinite where the logits hold no distribution
        (NaN, +inf); see `refuse_broken`.
    """
    p = logits.softmax(-1)
    # The likeliest token has the log-prob `top - norm`: no second pass of exponentials.
    top, log_top = logits.amax(-1, keepdim=True), p.amax(-1, keepdim=True).log()
    norm = top - log_top
    with without_autocast(logits.device):  # which would round vecdot to bfloat16
        entropy = norm[:, 0] - torch.linalg.vecdot(p, logits)
        # A token that is ruled out gives 0 * -inf. On a CPU most calls have none and end here.
        if logits.is_cuda or not bool(torch.isfinite(entropy).all()):
            finite = logits.masked_fill(logits == -torch.inf, 0.0)
            entropy = norm[:, 0] - torch.linalg.vecdot(p, finite)
    allowed = logits if without is None else logits.index_fill(-1, without, -torch.inf)
    if config.temperature == 0:
        token = allowed.argmax(-1)
    else:
        if config.temperature != 1 or without is not None:
            p = (allowed / config.temperature).softmax(-1)
        token = _invert(_keep_likeliest(p, config), uniform)
    # Not less `norm`, which is rounded to the size of the logits: a sure token's log-prob is tiny.
    logp = logits.gather(-1, token[:, None]) - top + log_top
    return Drawn(token, logp[:, 0], entropy)


def refuse_broken(is_broken: Tensor) -> None:
    """Refuse logits that hold no distribution.

    Args:
        is_broken: Whether an entropy was not finite, a single value; reading it waits for the
            device.

    Raises:
        OpdlabError: It was.
    """
    if bool(is_broken):
        raise OpdlabError(
            "The model's logits hold NaN or infinity while sampling. Check its weights,"
            " dtype and learning rate."
        )


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """Find the first token at which the cumulative probability passes `uniform` of the whole."""
    cdf = p.cumsum(-1)
    whole = cdf[:, -1]
    # Rounding must not reach the end.
    last = whole.nextafter(torch.zeros_like(whole))
    point = (uniform * whole).to(cdf.dtype).minimum(last)
    token = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
    return token.clamp(max=p.shape[-1] - 1)  # of NaN there is none


def _keep_likeliest(p: Tensor, config: SamplingConfig) -> Tensor:
    """Set the probability of filtered tokens to zero: first top_k, then top_p, then min_p."""
    if 0 < config.top_k < p.shape[-1]:
        ids = p.topk(config.top_k, -1).indices
        p = torch.zeros_like(p).scatter_(-1, ids, p.gather(-1, ids))
        p = p / p.sum(-1, keepdim=True)
    if config.top_p < 1:
        ordered, ids = p.sort(-1, descending=True)
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= config.top_p, 0.0)
        p = torch.zeros_like(p).scatter_(-1, ids, kept)
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), 0.0)
    return p
