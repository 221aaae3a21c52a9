"""Decide where a stage stands, from its ledger, then from its launcher. Pure.

A table of rules does it: the first one that holds gives the word and the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import EXIT_STOPPED
from ..events import Ended, Error, Event, PredictionStarted, Started, UnitCommitted, UnitsLost, of
from ..ledger_queries import by_stage, done_tasks, is_cancelled, last_step
from ..recipes.plan import Plan, Stage
from ..recipes.plan_summary import PlanSummary, StageSummary
from ..recipes.stage_kinds import STAGE_KINDS
from .base import FINAL_WORDS, JobState, StateWord, how_ended


@dataclass(frozen=True, kw_only=True)
class StageState:
    """The state of a stage.

    *step* of *total* is how much of it is done, in the unit of its kind.

    *advice* is what helps a failed one where `resume` does not.
    """

    word: StateWord
    reason: str = ""
    source: str = ""
    step: int = 0
    total: int = 0
    was_sent: bool = True
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts that the rules ask about.

    *events* are the stage's own, *job* is what the launcher knows, *is_stopping* its stop flag.
    """

    stage: Stage | StageSummary
    events: Sequence[Event]
    job: JobState | None
    is_stopping: bool = False

    def is_job(self, word: StateWord) -> bool:
        """Return whether the launcher says *word* of the job."""
        return self.job is not None and self.job.word == word

    @cached_property
    def job_reason(self) -> str:
        """The launcher's reason."""
        return self.job.reason if self.job is not None else ""

    @cached_property
    def is_done(self) -> bool:
        """Whether every task ended well."""
        return len(done_tasks(self.events, self.stage.name)) == self.stage.num_tasks

    @cached_property
    def has_lost_units(self) -> bool:
        """Whether what the newest end of a task had committed is gone."""
        newest = {(task, end.number) for task, end in self._ends.items()}
        return any((one.task, one.number) in newest for one in of(self.events, UnitsLost))

    @cached_property
    def _ends(self) -> dict[int, Ended]:
        return {event.task: event for event in of(self.events, Ended)}  # the newest of each task

    @cached_property
    def _open_at(self) -> list[float]:
        """The start times of the attempts that have not ended."""
        starts = {event.task: event for event in of(self.events, Started)}
        ends = self._ends
        return [one.time for task, one in starts.items() if task not in ends or ends[task].number < one.number]

    @cached_property
    def has_begun_since(self) -> bool:
        """Whether an attempt runs that started after the launcher was asked."""
        return any(started > (self.job.seen_at if self.job else 0) for started in self._open_at)

    @cached_property
    def has_ended(self) -> bool:
        """Whether attempts were made and all of them recorded their end."""
        return bool(self._ends) and not self._open_at

    @cached_property
    def exit_code(self) -> int:
        """The exit code of the first task that did not end well, or 0."""
        return next((end.exit_code for end in self._ends.values() if end.exit_code), 0)

    @cached_property
    def is_cancelled(self) -> bool:
        """Whether a person asked the newest job to end."""
        return is_cancelled(self.events, self.stage.name)

    @cached_property
    def error(self) -> Error | None:
        """The first error of the newest attempts; rank 0 comes first."""
        newest = {event.task: event.number for event in self.events if event.role != "client"}
        return next((one for one in of(self.events, Error) if one.number == newest.get(one.task, one.number)), None)

    @cached_property
    def failure(self) -> str:
        """Why it failed: its own error, else what the launcher or the exit code says."""
        if self.error is not None:
            return self.error.message
        said = "" if self.is_job("lost") else self.job_reason
        return said or how_ended(self.exit_code)

    @cached_property
    def last_seen(self) -> str:
        """The state of the stage by the ledger, while no launcher can be asked."""
        own = [event for event in self.events if event.role != "client"]
        if not own:
            return ""
        newest, at = own[-1], max(event.time for event in own)
        codes = [event.exit_code for event in of(own, Ended) if event.number == newest.number]
        step = last_step(own)
        how = (how_ended(codes[-1]) if codes else "running") + (f" at step {step}" if step else "")
        return f"; last seen at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}: {how}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The condition of a state, the word for it, and the reason.

    Without a *word* the launcher's own stands.
    """

    name: str
    holds: Callable[[Facts], bool]
    word: StateWord | None = None
    reason: Callable[[Facts], str] = lambda facts: ""
    source: str = "ledger"
    was_sent: bool = True


RULES: tuple[Rule, ...] = (
    Rule(name="every task ended well", holds=lambda facts: facts.is_done, word="done"),
    Rule(
        name="what it had committed is gone",
        holds=lambda facts: facts.has_lost_units and (facts.is_job("done") or facts.is_job("lost")),
        word="failed",
        reason=lambda facts: "units are gone or damaged; `resume` answers their rows again",
    ),
    Rule(
        name="the launcher does not answer",
        holds=lambda facts: facts.is_job("unknown"),
        word="unknown",
        reason=lambda facts: f"{facts.job_reason}{facts.last_seen}",
    ),
    Rule(
        name="no job was sent",
        holds=lambda facts: facts.job is None,
        word="lost",
        reason=lambda facts: "not sent; `resume` sends it",
        was_sent=False,
    ),
    Rule(
        name="the launcher saw an exit code 0 that no attempt recorded",
        holds=lambda facts: facts.is_job("done"),
        word="failed",
        reason=lambda facts: "ended without a record",
    ),
    Rule(
        name="it began after the launcher was asked, and is asked to stop",
        holds=lambda facts: facts.is_job("waiting") and facts.has_begun_since and facts.is_stopping,
        word="stopping",
    ),
    Rule(
        name="it began after the launcher was asked",
        holds=lambda facts: facts.is_job("waiting") and facts.has_begun_since,
        word="running",
    ),
    Rule(
        name="it saved and stopped, and the launcher has forgotten the job",
        holds=lambda facts: facts.is_job("lost") and facts.has_ended and facts.exit_code in (0, EXIT_STOPPED),
        word="stopped",
    ),
    Rule(
        name="a person cancelled it, and the launcher has forgotten the job",
        holds=lambda facts: facts.is_job("lost") and facts.is_cancelled,
        word="cancelled",
    ),
    Rule(
        name="it failed, and the launcher has forgotten the job",
        holds=lambda facts: facts.is_job("lost") and facts.has_ended,
        word="failed",
        reason=lambda facts: facts.failure,
    ),
    Rule(
        name="its ranks are asked to stop",
        holds=lambda facts: facts.is_job("running") and facts.is_stopping,
        word="stopping",
        reason=lambda facts: facts.job_reason,
        source="launcher",
    ),
    Rule(
        name="the launcher saw it fail",
        holds=lambda facts: facts.is_job("failed"),
        word="failed",
        reason=lambda facts: facts.failure,
        source="launcher",
    ),
    Rule(
        name="the launcher knows",
        holds=lambda facts: True,
        reason=lambda facts: facts.job_reason,
        source="launcher",
    ),
)


def rule_for(facts: Facts) -> Rule:
    """Return the first rule that holds; the last one always does."""
    return next(rule for rule in RULES if rule.holds(facts))


def stage_states(
    plan: Plan | PlanSummary,
    events: Sequence[Event],
    jobs: Mapping[str, JobState],
    *,
    stopping: frozenset[str] = frozenset(),
) -> dict[str, StageState]:
    """Return the states of all stages, from *events* and the launcher's *jobs*."""
    mine = by_stage(events)
    return {
        stage.name: _state(
            Facts(
                stage=stage,
                events=mine.get(stage.name, []),
                job=jobs.get(stage.name),
                is_stopping=stage.name in stopping,
            )
        )
        for stage in plan.stages
    }


def _state(facts: Facts) -> StageState:
    rule = rule_for(facts)
    word = rule.word or (facts.job.word if facts.job is not None else "lost")
    step, total = _progress(facts)
    advice = facts.error.advice if word == "failed" and facts.error is not None and not facts.is_job("done") else None
    return StageState(
        word=word,
        reason=rule.reason(facts),
        source=rule.source,
        step=total if word == "done" else step,
        total=total,
        was_sent=rule.was_sent,
        advice=advice or "",
    )


def _progress(facts: Facts) -> tuple[int, int]:
    """Return how much of a stage is done, and of how much, in the unit of its kind."""
    stage, kind = facts.stage, STAGE_KINDS.get(facts.stage.kind)
    unit = kind.progress if kind else None
    if unit == "steps":
        return last_step(facts.events), stage.steps
    if unit == "rows":
        rows = {(event.decoding, event.unit): event.num_rows for event in of(facts.events, UnitCommitted)}
        totals = {event.decoding: event.num_rows for event in of(facts.events, PredictionStarted)}
        return sum(rows.values()), sum(totals.values())
    if unit == "points" or (unit == "parts" and stage.num_tasks > 1):
        return len(done_tasks(facts.events, stage.name)), stage.num_tasks
    return 0, 0


def word_of(words: Iterable[StateWord]) -> StateWord:
    """Return the state of a stage that says most about its run."""
    found = set(words)
    order: list[StateWord] = ["running", "stopping", "unknown", "failed", "stopped", "cancelled", "waiting", "lost"]
    return next((word for word in order if word in found), "done" if found else "unknown")


def is_final(states: Mapping[str, StageState]) -> bool:
    """Return whether nothing of the run is waiting or running."""
    return all(state.word in FINAL_WORDS for state in states.values())
