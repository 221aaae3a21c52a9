"""Draw tokens by inverse transform.

One uniform number decides a token of a row. It is a function of counters alone, so a row draws the same in every
batch, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15  # the odd number nearest to 2**64 / golden ratio
_BLOCK = 512  # tokens that are summed up before one of them is looked for
_GROUP = 64  # tokens of which the likeliest is found, before the likeliest of all are
_FIRST_GUESS = 128  # likeliest tokens that mostly hold the probability top_p


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
    uniform = uniform.to(scores.device)[:, None]
    if 0 < top_k < scores.shape[-1]:
        tops = _group_tops(scores)
        values = _largest(scores, tops, top_k)
        best, least = values[:, :1], values[:, -1:]
        if top_p < 1:
            shares = (values - best).div_(temperature).exp_().double().cumsum(-1)
            least = _least_of(values, shares, top_p * shares[:, -1:])
        return _inverse_of_some(
            scores, tops, least, lambda some, rows: ((some - best[rows]) / temperature).exp_(), uniform
        )
    # A softmax takes half the time of its steps one by one. So small a temperature leaves only the best tokens.
    shares = (scores if temperature == 1 else scores / max(temperature, 1e-30)).softmax(-1)
    if top_p >= 1:
        return _inverse(shares, uniform)
    tops = _group_tops(shares)
    least = _nucleus(shares, tops, top_p)
    return _inverse_of_some(shares, tops, least, lambda some, rows: some, uniform)


def _whole_groups(values: torch.Tensor) -> torch.Tensor:
    """Return *values* (rows, tokens) as (rows, groups, tokens of a group).

    The rest that is no whole group is left out.
    """
    num_groups = values.shape[-1] // _GROUP
    return values[:, : num_groups * _GROUP].view(len(values), num_groups, _GROUP)


def _group_tops(values: torch.Tensor) -> torch.Tensor:
    """Return the largest of *values* in each group."""
    return _whole_groups(values).amax(-1)


def _within(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return *values* in *groups* (rows, groups), and the rest in none."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    rest = values[:, values.shape[-1] // _GROUP * _GROUP :]
    return torch.cat([_whole_groups(values)[rows, groups].flatten(1), rest], -1)


def _nucleus(shares: torch.Tensor, tops: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the least share of the tokens that hold *top_p* of all.

    Few do mostly, so only few are sorted at first.
    """
    size, most = shares.shape[-1], _FIRST_GUESS
    least, waiting = torch.empty_like(shares[:, :1]), torch.arange(len(shares), device=shares.device)
    while len(waiting):
        some = slice(None) if len(waiting) == len(shares) else waiting
        values = _largest(shares[some], tops[some], min(most, size))
        held = values.double().cumsum(-1)
        least[waiting] = _least_of(values, held, held.new_full((len(held), 1), top_p))
        waiting = waiting[held[:, -1] < top_p] if most < size else waiting[:0]
        most *= 8
    return least


def _largest(values: torch.Tensor, tops: torch.Tensor, count: int) -> torch.Tensor:
    """Return the *count* largest of *values* in each row, falling.

    Sorting a large vocabulary takes longest, so only the groups with the largest *tops* are sorted.
    """
    if tops.shape[-1] <= 2 * count:
        return values.topk(count).values
    return _within(values, tops.topk(count).indices).topk(count).values


def _least_of(values: torch.Tensor, shares: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the first of *values* at which the rising *shares* reach *goal*."""
    place = torch.searchsorted(shares, goal).clamp_max(values.shape[-1] - 1)
    return values.gather(-1, place)


def _inverse_of_some(
    values: torch.Tensor,
    tops: torch.Tensor,
    least: torch.Tensor,
    weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Return what `_inverse` does where only values from *least* on weigh.

    These tokens lie in few groups mostly: only those are looked at where they are less than half. A row decides that by
    itself, since the two ways round differently.
    """
    stays = tops >= least
    counts = stays.sum(-1)
    is_wide = 2 * counts >= tops.shape[-1]
    drawn = torch.empty_like(counts)
    if len(rows := is_wide.nonzero().squeeze(-1)):
        some = values[rows]
        drawn[rows] = _inverse(weigh(some, rows).masked_fill(some < least[rows], 0), uniform[rows])
    if len(rows := (~is_wide).nonzero().squeeze(-1)):
        # The row with most groups says how many are taken. What the others get more has no weight, and weights are
        # summed up one by one: so a running sum is the same beside any rows.
        groups = stays[rows].byte().topk(max(1, int(counts[rows].amax()))).indices.sort(-1).values
        some = _within(values if len(rows) == len(values) else values[rows], groups)
        weights = weigh(some, rows).masked_fill(some < least[rows], 0)
        places, _ = _find(weights.double().cumsum(-1), uniform[rows])
        place_of_group = groups.gather(-1, (places // _GROUP).clamp_max(groups.shape[-1] - 1))
        past = places - groups.shape[-1] * _GROUP  # where it is in the rest
        drawn[rows] = torch.where(
            past >= 0, tops.shape[-1] * _GROUP + past, place_of_group * _GROUP + places % _GROUP
        ).squeeze(-1)
    return drawn


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return where each row's running sum passes its share of the total.

    A float32 running sum of a large vocabulary loses tokens, one in float64 takes long. So blocks are summed up first;
    one of them is looked into.
    """
    size = weights.shape[-1]
    block, rest = _find(_sums(weights).cumsum(-1), uniform)
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
