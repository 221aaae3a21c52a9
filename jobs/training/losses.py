"""Compute the parts of losses that models do not compute themselves."""

from __future__ import annotations

import torch

_IGNORED_LABEL = -100


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
