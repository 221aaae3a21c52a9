"""Parts of losses, against what transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from sousbatch.jobs.training.losses import chosen_tokens, first_rows, num_labels, uniform_loss


@pytest.mark.parametrize(("shape", "is_shifted"), [((2, 5), True), ((2, 5), False), ((6,), False)])
def test_label_smoothing_is_that_of_transformers(shape: tuple[int, ...], is_shifted: bool) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(*shape, 7), torch.randint(0, 7, shape)
    labels[..., 0] = labels[..., -2] = -100
    smoother: Any = LabelSmoother(epsilon=0.2)
    expected = smoother({"logits": logits}, labels, shift_labels=is_shifted)
    kept = labels[..., 1:] if is_shifted else labels
    of = logits[..., :-1, :] if is_shifted else logits
    plain = torch.nn.functional.cross_entropy(of.reshape(-1, 7), kept.reshape(-1))
    uniform, count = uniform_loss(logits, labels, is_shifted=is_shifted)
    assert float(0.8 * plain + 0.2 * uniform / count) == pytest.approx(float(expected))


def test_what_a_model_would_answer_is_read_where_labels_count() -> None:
    labels = torch.tensor([[-100, 4, 2, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 5, 0, 6]]), 7).float()
    assert chosen_tokens(logits, labels, is_shifted=True) == ({3, 5}, {4, 2})
    assert chosen_tokens(logits, labels, is_shifted=False) == ({5, 0}, {4, 2})


def test_rows_that_ranks_repeat_do_not_count() -> None:
    labels = torch.tensor([[-100, 4, 2], [-100, 4, -100], [-100, 4, 2]])
    some = first_rows({"labels": labels}, 2)
    assert int(num_labels(some, is_shifted=True)) == 3 and labels[2, 1] == 4
    assert int(num_labels(first_rows({"labels": labels}, -5), is_shifted=True)) == 0
    places = {name: torch.tensor([3, 1, 0]) for name in ("start_positions", "end_positions")}
    assert int(num_labels(first_rows(places, 1), is_shifted=False)) == 1
