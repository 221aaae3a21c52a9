"""Define what a run's ledger records: one dataclass per kind of event.

Reading and writing the files is in `ledger`, questions about many events in `ledger_queries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from .errors import SousbatchError
from .redaction import redacted

_LARGEST = 1 << 63
KINDS: dict[str, type[Event]] = {}


# Each method that `dataclass` writes costs 0.2 ms of every command, for each kind: those that can be are inherited.
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Event:
    """One line of a ledger. A field whose value is None is not written.

    The reader fills in where the line stood: *role* and *number* of the file (the attempt of a stage or job, the
    submission of a client), and the line's *sequence*. *time* is seconds since the epoch, for people only: nothing is
    decided by it. A writer gives *stage* only in a client's file; other files have it in their names.
    """

    kind: ClassVar[str] = ""

    role: str = ""
    number: int = 0
    sequence: int = 0
    time: float = 0.0
    stage: str = ""
    task: int = 0

    def __init_subclass__(cls, kind: str = "") -> None:
        """Register a class under the *kind* of its lines; one without is a base class."""
        cls.kind = kind
        if kind:
            KINDS[kind] = cls

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def data(self) -> dict[str, Any]:
        """Return what the line holds beside its place and kind."""
        return {name: value for name in _types_of(type(self)) if (value := getattr(self, name)) is not None}

    @classmethod
    def read(cls, data: dict[str, Any], **place: Any) -> Event:
        """Return the event that a line's *data* describe.

        Fields that a newer version added are dropped.

        Raises:
            ValueError: a value has another type than its field, or one that is needed is missing.
        """
        known = {}
        for name, types in _types_of(cls).items():
            if name in data:
                _check(name, data[name], types)
                known[name] = data[name]
        try:
            return cls(**known, **place)
        except TypeError as error:  # a needed one is missing
            raise ValueError(str(error)) from error


def _check(name: str, value: object, types: tuple[type, ...]) -> None:
    if type(value) not in types or (type(value) is int and abs(value) >= _LARGEST):
        raise ValueError(f"{name} is {type(value).__name__}")


_TYPES: dict[str, dict[str, tuple[type, ...]]] = {}


def _types_of(cls: type[Event]) -> dict[str, tuple[type, ...]]:
    """Return the fields of an event's own, each with the types that JSON may give it."""
    if cls.kind not in _TYPES:  # when first asked for: looking the types up takes longer than reading a short ledger
        _TYPES[cls.kind] = dict(_look_up(cls))
    return _TYPES[cls.kind]


def _look_up(cls: type[Event]) -> Iterator[tuple[str, tuple[type, ...]]]:
    place = {one.name for one in fields(Event)}
    return ((one.name, _types(str(one.type))) for one in fields(cls) if one.name not in place)


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "dict": (dict,),
    "None": (type(None),),
}


def _types(annotation: str) -> tuple[type, ...]:
    """Return the types that JSON may give a field with this annotation.

    Such an annotation is "dict[str, str] | None".
    """
    names = (part.partition("[")[0].strip() for part in annotation.split("|"))
    return tuple(one for name in names for one in _JSON_TYPES[name])


_AnyEvent = TypeVar("_AnyEvent", bound=Event)


def of(found: Iterable[Event], *classes: type[_AnyEvent]) -> list[_AnyEvent]:
    """Return the events of these *classes*, in their order."""
    return [event for event in found if isinstance(event, classes)]


# What a client writes.


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Frozen(Event, kind="frozen"):
    """The run was written down.

    Holds the digests of plan.json and of the requests; for a point's run also its position in the sweep.
    """

    plan: str
    point: int | None = None
    requests: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intent(Event, kind="intent"):
    """A stage is about to be sent under *key*."""

    stage: str = field()
    key: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sent(Event, kind="sent"):
    """The launcher accepted a stage's job."""

    stage: str = field()
    key: str
    launcher: str
    job_id: str

    @property
    def submission(self) -> int:
        """The submission that sent the job."""
        return self.number


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Adopted(Sent, kind="adopted"):
    """A job was found by its key after the record of it was lost.

    *of* is the submission that had the intent.
    """

    of: int | None = None

    @property
    def submission(self) -> int:
        """The submission that sent the job."""
        return self.number if self.of is None else self.of


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Accepted(Event, kind="accepted"):
    """A person accepted these package versions.

    *was* has those that were expected before.
    """

    versions: dict[str, str]
    was: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CancelAsked(Event, kind="cancel"):
    """A person asked a stage's job to end; with *save* it saves first."""

    stage: str = field()
    save: bool | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trial(Event, kind="trial"):
    """The run is a trial of a search.

    *values* are the overrides that it was given, by their keys.
    """

    values: dict[str, str]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrialEnded(Event, kind="trial_ended"):
    """A trial has come to its end: "complete" with a *value*, "pruned" or "failed"."""

    word: str
    value: float | None = None


# What a stage process writes.


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Started(Event, kind="attempt"):
    """An attempt began.

    *job* is the launcher's job that started it; the sizes are those of a training's batch, and *fallbacks* are what it
    gives up for device memory, with commas between.
    """

    job: str | None = None
    host: str | None = None
    pid: int | None = None
    version: str | None = None
    python: str | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    fallbacks: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Ended(Event, kind="ended"):
    """An attempt ended; *progress* counts what it committed."""

    exit_code: int
    progress: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Error(Event, kind="error"):
    """The description of a failure.

    *advice* helps where `resume` does not; *exit_code* is that of the rank that wrote it.
    """

    message: str
    advice: str | None = None
    exit_code: int | None = None

    @classmethod
    def of_exception(cls, error: BaseException, *, exit_code: int | None = None) -> Error:
        """Return the record of *error*: one line without secrets, and its advice."""
        is_ours = isinstance(error, SousbatchError)
        message = str(error) if is_ours else f"{type(error).__name__}: {error}"
        advice = (error.advice or None) if isinstance(error, SousbatchError) else None
        return cls(message=redacted(" ".join(message.split()))[:500], advice=advice, exit_code=exit_code)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Finished(Event, kind="finished"):
    """Rank 0 of a Slurm job came to its end.

    srun alone does not say so: it exits with 0 also when it lost a node.
    """


# What a training writes.


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Step(Event, kind="step"):
    """An optimizer step.

    *values* are what training reports of it: loss, eval_loss, learning_rate, its speed since the last and others.
    """

    step: int
    values: dict[str, float] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """Return the line, in which the values stand beside the step."""
        return {"step": self.step, **self.values}

    @classmethod
    def read(cls, data: dict[str, Any], **place: Any) -> Event:
        """Return the event of a line.

        Values that are no numbers are dropped, except that a loss must be one.
        """
        _check("step", data.get("step"), (int,))
        for name in ("loss", "eval_loss"):
            _check(name, data.get(name, 0.0), (float, int))
        values = {name: value for name, value in data.items() if type(value) in (float, int) and name != "step"}
        return cls(step=data["step"], values=values, **place)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Resumed(Event, kind="resumed"):
    """Training resumed from the checkpoint of *step*."""

    step: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Problem(Event, kind="problem"):
    """Something is wrong that does not end the training."""

    message: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Diverged(Event, kind="diverged"):
    """The training was stopped at *step*, because it no longer learned."""

    step: int
    message: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Skipped(Event, kind="skipped"):
    """A save was left out, and why."""

    step: int | None = None
    message: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CheckpointEvent(Event):
    """The fields that all events of a checkpoint share.

    *held_bytes* is what the stage's checkpoints hold now, *budget_bytes* what they may hold.
    """

    step: int
    content: str | None = None
    num_bytes: int | None = None
    metric: float | None = None
    held_bytes: int | None = None
    budget_bytes: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Saved(CheckpointEvent, kind="saved"):
    """A checkpoint was committed, while training stood still for *stall_s*."""

    stall_s: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Retention(CheckpointEvent):
    """The fate of a checkpoint of *attempt*; *left_bytes* are still there."""

    attempt: int | None = None
    left_bytes: int | None = None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Kept(Retention, kind="kept"):
    """The checkpoint should have gone and is still there; *message* says why."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stripped(Retention, kind="thinned"):
    """Only the checkpoint's weights are left."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Archived(Retention, kind="archived"):
    """The checkpoint was moved to the archive."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Removed(Retention, kind="removed"):
    """The checkpoint was deleted."""


# What the other jobs write.


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ModelWritten(Event, kind="model"):
    """A consolidated model was committed."""

    digest: str | None = None
    num_params: int | None = None
    num_bytes: int | None = None
    dtype: str | None = None
    step: int | None = None
    num_overflowing: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PredictionStarted(Event, kind="layout"):
    """A predict task began.

    Its rows come in units of *unit_rows*, of which *num_committed* were there already.
    """

    num_rows: int
    unit_rows: int | None = None
    num_committed: int | None = None
    key: str | None = None
    decoding: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class UnitCommitted(Event, kind="unit"):
    """A unit of predictions was committed."""

    unit: int
    num_rows: int
    decoding: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class UnitsLost(Event, kind="units_lost"):
    """Units that this attempt had committed are gone, so that its task is not done."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Merged(Event, kind="merged"):
    """The complete predictions file was written."""

    decoding: str = ""
    key: str | None = None
    num_rows: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Scored(Event, kind="scored"):
    """Scores were computed: for the model and for its baseline, by metric."""

    decoding: str = ""
    split: str | None = None
    num_rows: int | None = None
    scores: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Published(Event, kind="published"):
    """What the run made was sent to *url* and compared there.

    *digest* is that of its model.
    """

    url: str
    num_files: int | None = None
    num_bytes: int | None = None
    digest: str | None = None
