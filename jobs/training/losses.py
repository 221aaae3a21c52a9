"""Compute the parts of losses that models do not compute themselves."""

from __future__ import annotations

from typing import Any

import torch

_IGNORED_LABEL = -100
_BEYOND_ANY_TEXT = 2**31 - 1  # models for questions ignore a place behind their tokens
_LABELS = {"labels": _IGNORED_LABEL, "start_positions": _BEYOND_ANY_TEXT, "end_positions": _BEYOND_ANY_TEXT}


def first_rows(batch: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """Return *batch* with the labels of its first *num_rows* rows alone.

    The others do not count in a loss.
    """
    found = dict(batch)
    for name in _LABELS.keys() & batch.keys():
        found[name] = batch[name].clone()
        found[name][max(0, num_rows) :] = _LABELS[name]
    return found


def num_labels(batch: dict[str, Any], *, is_shifted: bool) -> torch.Tensor:
    """Return how many labels of *batch* count in its mean loss."""
    name = "labels" if "labels" in batch else "start_positions"
    labels: torch.Tensor = batch[name][..., 1:] if is_shifted else batch[name]
    return (labels != _LABELS[name]).sum()


def chosen_tokens(logits: torch.Tensor, labels: torch.Tensor, *, is_shifted: bool) -> tuple[set[int], set[int]]:
    """Return the tokens that a model would answer, and those that it should.

    They are taken where *labels* count, each after the right tokens before it.
    """
    if is_shifted:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    counts = labels != _IGNORED_LABEL
    chosen, wanted = logits.argmax(-1)[counts], labels[counts]
    return set(torch.unique(chosen).tolist()), set(torch.unique(wanted).tolist())


def uniform_loss(logits: torch.Tensor, labels: torch.Tensor, *, is_shifted: bool) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy against a uniform target, and its labels.

    It is the second term of label smoothing (Szegedy et al. 2016): the mean over outputs of -log p, which is
    logsumexp(logits) - mean(logits). *logits* have one dimension more than *labels*; in a causal model each is for the
    next label, *is_shifted*.
    """
    if is_shifted:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    counted = logits[labels != _IGNORED_LABEL].float()  # (labels that count, outputs)
    return (counted.logsumexp(-1) - counted.mean(-1)).sum(), counted.shape[0]
