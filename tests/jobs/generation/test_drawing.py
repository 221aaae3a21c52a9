"""Drawn tokens follow the distribution, and depend on their own row and step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sousbatch.jobs.generation.drawing import draw, uniforms

NUM = 10_000
SIZES = [7, 512, 1500, 40_000]  # within a block, a whole one, some and a shorter one, groups of them


def _numbers(seed: int = 0) -> torch.Tensor:
    return uniforms(seed, [(row, 0, 0) for row in range(NUM)], 1)[:, 0]


def test_the_numbers_are_uniform_over_rows_samples_and_steps() -> None:
    by_row, by_step = _numbers(), uniforms(3, [(5, 2, 0)], NUM)[0]
    by_sample = uniforms(0, [(5, sample, 0) for sample in range(NUM)], 1)[:, 0]
    for numbers in (by_row, by_step, by_sample):
        counts = torch.histc(numbers, 100, 0, 1)
        assert ((counts - NUM / 100) ** 2 / (NUM / 100)).sum() < 160  # chi-square of 99: p = 1e-4
        lag = torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]
        assert abs(lag) < 4 / NUM**0.5
        assert 0 < numbers.min() and numbers.max() < 1


def test_a_number_depends_on_its_own_counters_alone() -> None:
    table = uniforms(1, [(4, 0, 0), (9, 1, 0), (9, 0, 3)], 8)
    assert torch.equal(uniforms(1, [(9, 1, 0)], 8)[0], table[1])
    assert torch.equal(uniforms(1, [(9, 0, 0)], 11)[0, 3:], table[2])  # a chunk draws on where the last one ended
    assert len({round(float(number), 12) for number in table.flatten()}) == table.numel()
    assert not torch.equal(uniforms(2, [(4, 0, 0)], 8)[0], table[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.5}]
)
def test_draws_follow_the_distribution_that_transformers_would_draw_from(size: int, options: dict[str, Any]) -> None:
    from transformers.generation import logits_process as theirs

    generator = torch.Generator().manual_seed(size)
    row = torch.randn(1, size, generator=generator) * 2
    row[0, torch.randperm(size, generator=generator)[:5]] += 9  # few tokens hold most of it, as a model's do
    expected = row / options.get("temperature", 1.0)
    if k := options.get("top_k"):
        expected = theirs.TopKLogitsWarper(k)(torch.zeros(1, 1), expected)
    if p := options.get("top_p"):
        expected = theirs.TopPLogitsWarper(p)(torch.zeros(1, 1), expected)
    shares = expected.double().softmax(-1)[0]
    num = 1000 if size < 5000 else 100
    numbers = (torch.arange(num, dtype=torch.float64) + 0.5) / num  # each token has its share, give or take one
    counts = torch.bincount(draw(row.expand(num, -1), numbers, **options), minlength=size)
    assert counts[shares == 0].sum() == 0
    assert (counts - shares * num).abs().max() < 1.01


def test_drawing_with_the_rows_own_numbers_follows_the_distribution() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0, 1.5]])
    counts = torch.bincount(draw(row.expand(NUM, -1), _numbers()), minlength=5)
    wanted = row[0].double().softmax(-1) * NUM
    assert ((counts - wanted) ** 2 / wanted).sum() < 23.5  # chi-square of 4: p = 1e-4


def test_tokens_as_likely_as_the_last_that_stays_all_stay() -> None:
    """16-bit scores tie often; which of them a sort would keep could depend on the batch."""
    row = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.6}):
        assert set(draw(row.repeat(2000, 1), _numbers()[:2000], **options).tolist()) == {1, 2, 3, 4}


def test_the_ends_of_the_interval_draw_tokens_that_have_a_share() -> None:
    row = torch.full((1, 1300), -torch.inf)
    row[0, [3, 700]] = 0.0
    least, most = draw(row, torch.tensor([1e-300])), draw(row, torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert (least.item(), most.item()) == (3, 700)
    assert draw(torch.full((1, 9), torch.nan), torch.tensor([0.5])).item() in range(9)  # refused after the batch


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 300}, {"top_p": 0.5}, {"top_p": 0.999}])
@pytest.mark.parametrize("size", [65, 1500, 20_001])
def test_a_draw_is_the_same_beside_any_rows(size: int, options: dict[str, Any]) -> None:
    """Some rows keep few tokens, some nearly all, and some only those past the last whole group."""
    scores = torch.randn(24, size, generator=torch.Generator().manual_seed(size))
    scores[::3] *= 9
    scores[1::3, -1] += 40
    numbers = _numbers()[:24]
    alone = [draw(row[None], number[None], **options) for row, number in zip(scores, numbers, strict=True)]
    assert torch.equal(draw(scores.flip(0), numbers.flip(0), **options).flip(0), torch.cat(alone))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_scores_that_are_no_numbers_and_the_least_temperature_draw_tokens_that_exist(options: dict[str, Any]) -> None:
    scores = torch.arange(1300.0).repeat(3, 1)
    scores[0] = torch.nan
    scores[1] = -torch.inf
    drawn = draw(scores, _numbers()[:3], temperature=1e-38, **options)
    assert drawn[2] == 1299 and drawn.max() < 1300 and drawn.min() >= 0
