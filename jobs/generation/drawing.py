"""Draw tokens by inverse transform.

One uniform number decides a token of a row. It is a function of counters alone, so a row draws the same in every
batch, on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15  # the odd number nearest to 2**64 / golden ratio
_BLOCK = 512  # tokens that are summed up before one of them is looked for
_GROUP = 64  # tokens of which the likeliest is found, before the likeliest of all are
_FIRST_GUESS = 256  # likeliest tokens that mostly hold the probability top_p


def uniforms(seed: int, streams: Sequence[tuple[int, int, int]], num_steps: int) -> torch.Tensor:
    """Return float64 numbers in (0, 1), of shape (streams, steps).

    A stream is (row, sample, first step). Its numbers are those of SplitMix64 (Steele, Lea and Flood 2014), whose state
    is a hash of seed, row and sample.
    """
    rows, samples, firsts = np.array(streams, dtype=np.uint64).reshape(-1, 3).T
    start = np.array([(seed + _GAMMA) % 2**64], dtype=np.uint64)
    state = _mixed(_mixed(_mixed(start) ^ rows) ^ samples)
    steps: NDArray[np.uint64] = np.add(firsts[:, None], np.arange(1, num_steps + 1), dtype=np.uint64, casting="unsafe")
    outputs: NDArray[np.uint64] = state[:, None] + steps * np.uint64(_GAMMA)
    bits = _mixed(outputs)
    return torch.from_numpy(((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of SplitMix64: each of 64 bits depends on each."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed


def draw(
    scores: torch.Tensor, uniform: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Return a token for each row of *scores* (rows, vocabulary).

    The token is the one in whose share of the distribution the number of *uniform* (rows) falls. Tokens that are as
    likely as the last one of the *top_k*, or of the *top_p*, stay too: which of them would go could depend on the
    batch.
    """
    best = scores.amax(-1, keepdim=True)
    weights = torch.sub(scores, best).div_(temperature).exp_()
    least = None
    if 0 < top_k < scores.shape[-1]:
        values = _largest(scores, top_k)
        least = values[:, -1:]
        if top_p < 1:
            shares = (values - best).div_(temperature).exp_().double().cumsum(-1)
            least = _least_of(values, shares, top_p * shares[:, -1:])
    elif top_p < 1:
        least = _nucleus(scores, best, _sums(weights).sum(-1, keepdim=True), temperature, top_p)
    if least is not None:
        weights.masked_fill_(scores < least, 0)
    return _inverse(weights, uniform)


def _nucleus(
    scores: torch.Tensor, best: torch.Tensor, total: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Return the least score of the tokens that hold *top_p* of *total*.

    Few do mostly, so only few are sorted at first.
    """
    size, most = scores.shape[-1], _FIRST_GUESS
    least, waiting = torch.empty_like(best), torch.arange(len(scores), device=scores.device)
    while len(waiting):
        values = _largest(scores if len(waiting) == len(scores) else scores[waiting], min(most, size))
        shares = (values - best[waiting]).div_(temperature).exp_().double().cumsum(-1)
        goal = top_p * total[waiting]
        least[waiting] = _least_of(values, shares, goal)
        waiting = waiting[(shares[:, -1:] < goal).squeeze(-1)] if most < size else waiting[:0]
        most *= 16
    return least


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the *count* largest scores of each row, falling.

    Sorting a large vocabulary takes longest, so only the groups with the largest maxima are sorted.
    """
    num_groups = scores.shape[-1] // _GROUP
    if num_groups <= 2 * count:
        return scores.topk(count).values
    groups = scores[:, : num_groups * _GROUP].reshape(len(scores), -1, _GROUP)
    chosen = groups.amax(-1).topk(count).indices
    inside = groups.gather(1, chosen[..., None].expand(-1, -1, _GROUP)).flatten(1)
    return torch.cat([inside, scores[:, num_groups * _GROUP :]], -1).topk(count).values


def _least_of(values: torch.Tensor, shares: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the first of *values* at which the rising *shares* reach *goal*."""
    place = torch.searchsorted(shares, goal).clamp_max(values.shape[-1] - 1)
    return values.gather(-1, place)


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return where each row's running sum passes its share of the total.

    A float32 running sum of a large vocabulary loses tokens, one in float64 takes long. So blocks are summed up first;
    one of them is looked into.
    """
    size = weights.shape[-1]
    block, rest = _find(_sums(weights).cumsum(-1), uniform.to(weights.device)[:, None])
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inner = weights.gather(-1, places.clamp_max(size - 1)).masked_fill_(places >= size, 0)
    place, _ = _find(inner.double().cumsum(-1), rest)
    return (block * _BLOCK + place).clamp_max(size - 1).squeeze(-1)


def _sums(weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of each block of *weights*, in float64.

    The last block may be shorter.
    """
    cut = weights.shape[-1] // _BLOCK * _BLOCK
    parts = [weights[:, :cut].reshape(len(weights), -1, _BLOCK).sum(-1), weights[:, cut:].sum(-1, keepdim=True)]
    return torch.cat(parts if cut else parts[1:], -1).double()


def _find(ends: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which part holds *share* of the total, and the share within it.

    *ends* are running sums, up to the end of each part. A part without weight is never found.
    """
    goal = share.clamp(0, 1 - 1e-15) * ends[:, -1:]
    place = torch.searchsorted(ends, goal, right=True).clamp_max(ends.shape[-1] - 1)
    end = ends.gather(-1, place)
    begin = torch.where(place > 0, ends.gather(-1, (place - 1).clamp_min(0)), torch.zeros_like(end))
    return place, (goal - begin) / (end - begin)
