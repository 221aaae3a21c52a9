"""Carry decisions out.

The rename comes first, so that a reader sees a checkpoint in full or not at all. What replaces a checkpoint, its
weights or its copy in the archive, is committed before it goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import files
from ..errors import FencedError, SousbatchError, UsageError
from ..events import Archived, Kept, Removed, Retention, Stripped
from . import commit
from .archive import upload
from .commit import Checkpoint
from .consolidation.options import ConsolidateOptions, Overflow
from .formats.companion_files import CONFIG_NAME
from .formats.tensors import FloatDtype
from .retention.decisions import RetentionDecision, decide
from .retention.policies import RetentionRules

STATE_NAME = "trainer_state.json"
WRITER_LOCK = ".writer"  # held by the job that writes checkpoints to the folder

Outcome = Literal["removed", "thinned", "archived", "kept"]


@dataclass(frozen=True, kw_only=True)
class RemovalOptions:
    """Options of carrying decisions out.

    They are the weights' dtype, where the archive is, and who may still act. *overflow* is what happens to weights
    beyond float16's range, as in `consolidate`.
    """

    check_fence: Callable[[], None]
    dtype: FloatDtype = "float16"
    overflow: Overflow = "refuse"
    archive_url: str | None = None


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Options of pruning the checkpoints of a folder.

    They say what stays, how the rest goes, and what a stripped one holds. *owns_leftovers* says that all that has a
    temporary name there is ours, and is removed.
    """

    rules: RetentionRules
    removal: RemovalOptions
    weights_bytes: int = 0
    owns_leftovers: bool = False


@dataclass(frozen=True, kw_only=True)
class RetentionResult:
    """The outcome of a decision on a checkpoint, and its reason.

    *problem* says why one is kept against its decision, *left_bytes* what is left.
    """

    checkpoint: Checkpoint
    outcome: Outcome
    reason: str
    problem: str = ""
    left_bytes: int = 0

    def event(self, *, held_bytes: int, budget_bytes: int | None = None, stage: str = "") -> Retention:
        """Return the record for the run's ledger; a client's file must name the *stage*."""
        return _EVENTS[self.outcome](
            stage=stage,
            step=self.checkpoint.step,
            attempt=self.checkpoint.attempt,
            content=self.checkpoint.content,
            num_bytes=self.checkpoint.num_bytes,
            metric=self.checkpoint.metric,
            held_bytes=held_bytes,
            budget_bytes=budget_bytes,
            left_bytes=self.left_bytes,
            reason=self.reason,
            message=self.problem or None,
        )


_EVENTS: dict[Outcome, type[Retention]] = {
    "kept": Kept,
    "thinned": Stripped,
    "archived": Archived,
    "removed": Removed,
}


def carry_out(decisions: Iterable[RetentionDecision], options: RemovalOptions) -> Iterator[RetentionResult]:
    """Yield what was done for each decision that is not to keep.

    Each is yielded as soon as it is done. A checkpoint that cannot be stripped or archived stays as it is.

    Raises:
        FencedError: a newer attempt exists; what is left is left.
    """
    for decision in decisions:
        if decision.action != "keep":
            yield _one(decision, options)


def _one(decision: RetentionDecision, options: RemovalOptions) -> RetentionResult:
    one, left_bytes = decision.checkpoint, 0
    options.check_fence()
    try:
        if decision.action == "strip":
            left_bytes = strip_to_weights(one, options).num_bytes
        elif decision.action == "archive" and options.archive_url is not None:
            upload(one, options.archive_url, options.check_fence)
        options.check_fence()
        files.remove_tree(one.path)
    except FencedError:
        raise
    except (SousbatchError, OSError) as error:  # the next rotation decides again, from what is there
        return RetentionResult(
            checkpoint=one, outcome="kept", reason=decision.reason, problem=str(error), left_bytes=one.num_bytes
        )
    outcomes: dict[str, Outcome] = {"strip": "thinned", "archive": "archived", "delete": "removed"}
    return RetentionResult(
        checkpoint=one, outcome=outcomes[decision.action], reason=decision.reason, left_bytes=left_bytes
    )


def prune(
    folder: Path, options: PruneOptions, *, is_dry: bool
) -> Iterator[tuple[RetentionDecision, RetentionResult | None]]:
    """Yield the decision on everything in *folder*.

    Unless *is_dry*, yield also what was done about it.

    Raises:
        UsageError: a job writes checkpoints there now; it prunes by itself.
    """
    with ExitStack() as stack:
        if not is_dry and not stack.enter_context(files.locked(folder / WRITER_LOCK, wait=False)):
            raise UsageError(f"a job writes checkpoints to {folder} now and prunes them by itself; see --dry-run")
        found = commit.list_checkpoints(folder)
        if options.owns_leftovers and not (is_dry and files.is_locked(folder / WRITER_LOCK)):
            left = [one for one in found if one.path.name.startswith(files.TEMPORARY_PREFIX)]
            found = tuple(one for one in found if one not in left)
            yield from _swept(folder, left, is_dry=is_dry)
        for decision in decide(found, options.rules, weights_bytes=options.weights_bytes):
            yield decision, None if is_dry else next(carry_out([decision], options.removal), None)


def _swept(
    folder: Path, left: Sequence[Checkpoint], *, is_dry: bool
) -> Iterator[tuple[RetentionDecision, RetentionResult | None]]:
    if not is_dry:
        commit.sweep(folder)
    for one in left:
        reason = "left by a save or a removal that was killed"
        decision = RetentionDecision(checkpoint=one, action="delete", reason=reason, frees_bytes=one.num_bytes)
        yield decision, None if is_dry else RetentionResult(checkpoint=one, outcome="removed", reason=reason)


def strip_to_weights(checkpoint: Checkpoint, options: RemovalOptions) -> Checkpoint:
    """Commit the weights of *checkpoint* beside it and return them.

    The full one is left to the caller.

    Raises:
        SousbatchError: it cannot be consolidated; the message says why.
    """
    from .consolidation.consolidate import consolidate
    from .consolidation.output import work_dir
    from .integrity import open_verified  # with torch, which `checkpoints list` does without

    folder, step, attempt = checkpoint.path.parent, checkpoint.step, checkpoint.attempt
    temporary = commit.temporary_dir(folder, step, attempt, "weights")
    files.discard(temporary)
    try:
        consolidate(
            open_verified(checkpoint.path),
            temporary,
            ConsolidateOptions(dtype=options.dtype, overflow=options.overflow, copy_from=checkpoint.path),
        )
        config = checkpoint.path / CONFIG_NAME
        if config.is_file() and not (temporary / CONFIG_NAME).exists():  # an adapter's: its labels, its vocabulary
            shutil.copyfile(config, temporary / CONFIG_NAME)
        files.write_json(temporary / STATE_NAME, {"global_step": step})  # what a model made of it says it is
        return commit.commit(
            temporary,
            step=step,
            attempt=attempt,
            metric=checkpoint.metric,
            world_size=checkpoint.world_size,
            check_fence=options.check_fence,
            content="weights",
        )
    except BaseException:
        files.discard(temporary)
        files.discard(work_dir(temporary))  # on a full disk it may not wait for the next attempt to thin
        raise
