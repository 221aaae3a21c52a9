"""Prepare the rows of a split: clean, select, augment, in this order.

What each step did is counted. Rows are numbered from 1 as they stand in the file, whatever was left out before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from ...errors import Fault, UsageError
from ...files import parse_json
from ..facts import Rows, StepCount
from ..schema import Augment, Bm25, Select, StageSettings
from ..stage_kinds import RowUse
from ..tasks import task_of
from . import hangul
from .chat import out_of_json
from .cleaning import FILTERS, TEXT_STEPS, filter_of, is_own, problem_of
from .own_functions import OwnFunction
from .prompts import MESSAGES, has_turns
from .rows import Row
from .selection import best_rows, sample_of, search_terms, singles_of

Numbered = tuple[int, dict[str, Any]]
Load = Callable[[str, str], OwnFunction]  # from the recipe's key and the function's name
_NUM_NAMED = 5
AUGMENTS = ("hangul",)
_OF_TURN, _OF_PART = ("content", "value"), ("text",)  # texts of {role, content}, {from, value}; of {type, text}
_OWN = "an own function as module:function"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is done to the rows of one split for one use.

    *columns* are those with text, *input_column* and *target_column* among them; *identity* is that of a row's id, and
    *conversation_column* may hold text in JSON. Rows that are to be predicted all stay (*keeps_all*).
    """

    clean: tuple[str, ...] = ()
    select: Select | None = None
    augment: Augment | None = None
    columns: tuple[str, ...] = ()
    input_column: str = ""
    target_column: str = ""
    search_column: str = ""
    conversation_column: str = ""
    identity: str | None = None
    keeps_all: bool = False

    @property
    def own_functions(self) -> tuple[tuple[str, str], ...]:
        """The user's own functions: (key that names one, its name)."""
        found = [("data.clean", name) for name in self.clean if is_own(name)]
        if self.select is not None and self.select.function:
            found.append(("data.select.function", self.select.function))
        if self.augment is not None and self.augment.name not in AUGMENTS:
            found.append(("data.augment.name", self.augment.name))
        return tuple(found)


def steps_of(settings: StageSettings, use: RowUse) -> Steps | None:
    """Return what a stage's settings do to rows of a use; None for nothing."""
    data = settings.data
    is_trained, keeps_all = use == "train", use in ("predict", "score")
    clean = tuple(name for name in data.clean if not (keeps_all and name.startswith(FILTERS)))
    if not clean and not (is_trained and (data.select or data.augment)):
        return None
    uses: tuple[RowUse, ...] = ("train", "predict", "score")
    read = {one.name for each in uses for one in task_of(settings.task).columns(settings, each)}
    search = data.columns.input if data.prompt else data.columns.text
    return Steps(
        clean=clean,
        select=data.select if is_trained else None,
        augment=data.augment if is_trained else None,
        columns=tuple(sorted(read - {data.columns.id})),
        input_column=data.columns.input,
        target_column=data.columns.target,
        conversation_column=data.columns.messages if data.prompt == MESSAGES else "",
        search_column=(data.select.bm25.column if data.select and data.select.bm25 else None) or search,
        identity=data.columns.id,
        keeps_all=keeps_all,
    )


def step_faults(settings: StageSettings) -> Iterator[Fault]:
    """Yield what is wrong with the steps of a recipe, before any file is read."""
    data = settings.data
    for number, name in enumerate(data.clean):
        problem, hint = problem_of(name)
        if problem:
            yield Fault(key=f"data.clean.{number}", problem=problem, hint=hint)
    select, augment = data.select, data.augment
    if select is not None and select.function and not is_own(select.function):
        yield Fault(key="data.select.function", problem=f"is {select.function!r}", hint=_OWN)
    if select is not None and select.bm25 is not None and not any(map(search_terms, select.bm25.queries)):
        yield Fault(key="data.select.bm25.queries", problem="has no word to look for", hint="such as [kitchen, garden]")
    if augment is not None and augment.name not in AUGMENTS and not is_own(augment.name):
        problem = f"is {augment.name!r}" if augment.name else "is missing"
        yield Fault(key="data.augment.name", problem=problem, hint=f"{', '.join(AUGMENTS)}, or {_OWN}")
    if augment is not None and augment.name in AUGMENTS:
        without = "" if task_of(settings.task).generates else f"task {settings.task}"
        if not without and (not data.prompt or has_turns(data.prompt)):
            without = "a conversation" if data.prompt else "plain text"
        if without:
            problem = f"is {augment.name}, which makes an input of the target's text, and {without} has no such text"
            yield Fault(key="data.augment.name", problem=problem, hint=f"leave it out, or {_OWN}")


class _Tally:
    """The counter of one step."""

    def __init__(self, name: str) -> None:
        self._name, self._added = name, 0
        self._seen: dict[str, tuple[int, tuple[int, ...]]] = {}

    def note(self, what: str, number: int) -> None:
        """Count a row that was changed, dropped, or kept though the step would drop it."""
        num, first = self._seen.get(what, (0, ()))
        self._seen[what] = (num + 1, (*first, number) if len(first) < _NUM_NAMED else first)

    def add(self) -> None:
        """Count a row that was made."""
        self._added += 1

    def count(self) -> StepCount:
        """Return what was counted."""
        rows = {what: Rows(num=num, first=first) for what, (num, first) in self._seen.items()}
        return StepCount(name=self._name, added=self._added, **rows)


class Preparation:
    """The rows of a split on their way through the steps.

    Iterate over it once, then ask for `counts`.
    """

    def __init__(self, rows: Iterable[Row], steps: Steps, load: Load, spool: Callable[[], IO[bytes]]) -> None:
        """Set the steps up.

        *spool* opens an empty file to write and read, which holds rows while some of them are selected.
        """
        self._steps, self._load, self._spool = steps, load, spool
        self._tallies: list[_Tally] = []
        self.num_read = 0
        made: Iterator[Numbered] = self._numbered(rows)
        for name in steps.clean:
            made = self._cleaned(made, name)
        if steps.select is not None:
            made = self._selected(made, steps.select)
        if steps.augment is not None:
            made = self._augmented(made, steps.augment)
        self._rows = made

    def __iter__(self) -> Iterator[Numbered]:
        return self._rows

    @property
    def counts(self) -> tuple[StepCount, ...]:
        """What each step did to the rows so far."""
        return tuple(tally.count() for tally in self._tallies)

    def _tally(self, name: str) -> _Tally:
        self._tallies.append(_Tally(name))
        return self._tallies[-1]

    def _numbered(self, rows: Iterable[Row]) -> Iterator[Numbered]:
        for number, row in enumerate(rows, 1):
            self.num_read = number
            column = self._steps.conversation_column
            yield number, {**row, column: out_of_json(row[column])} if column in row else dict(row)

    def _cleaned(self, rows: Iterator[Numbered], name: str) -> Iterator[Numbered]:
        tally = self._tally(f"clean {name}")
        if name in TEXT_STEPS:
            return _changed(rows, TEXT_STEPS[name].change, self._steps.columns, tally)
        if is_own(name):
            return _by_function(rows, self._load("data.clean", name), self._steps, tally)
        return _filtered(rows, filter_of(name), self._steps.columns, tally)

    def _selected(self, rows: Iterator[Numbered], spec: Select) -> Iterator[Numbered]:
        if spec.function is not None:
            rows = _asked(rows, self._load("data.select.function", spec.function), self._tally("select function"))
        if spec.bm25 is not None:
            rows = _found(rows, spec.bm25, self._steps.search_column, self._spool(), self._tally("select bm25"))
        if spec.sample is not None:
            rows = _sampled(rows, spec.sample, spec.seed, self._spool(), self._tally("select sample"))
        return rows

    def _augmented(self, rows: Iterator[Numbered], spec: Augment) -> Iterator[Numbered]:
        is_ours = spec.name in AUGMENTS
        make = _obfuscated(self._steps) if is_ours else _made(self._load("data.augment.name", spec.name))
        return _with_copies(rows, make, spec, self._tally(f"augment {spec.name}"))


def texts_of(row: Row, columns: Iterable[str]) -> list[str]:
    """Return the texts of a row's *columns*, and those in conversations."""
    found = []
    for column in columns:
        value = row.get(column)
        if isinstance(value, list):
            found += _said(value)
        elif value is not None and not isinstance(value, dict):
            found.append(str(value))
        elif column in row and value is None:
            found.append("")
    return found


def _said(turns: Sequence[Any], names: Sequence[str] = _OF_TURN) -> list[str]:
    """Return the texts of a conversation, whose turns may have several parts."""
    found = list[str]()
    for one in turns:
        for value in (one.get(name) for name in names) if isinstance(one, dict) else ():
            found += _said(value, _OF_PART) if isinstance(value, list) else [value] if isinstance(value, str) else []
    return found


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change the texts of a column, those of turns and of answers too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_with_texts(one, change) for one in value]
    if isinstance(value, dict):
        return value | {name: _with_texts(value[name], change) for name in (*_OF_TURN, *_OF_PART) if name in value}
    return value


def _changed(
    rows: Iterator[Numbered], change: Callable[[str], str], columns: Sequence[str], tally: _Tally
) -> Iterator[Numbered]:
    for number, row in rows:
        new = {column: _with_texts(row[column], change) for column in columns if column in row}
        if any(row[column] != value for column, value in new.items()):
            tally.note("changed", number)
            row = {**row, **new}
        yield number, row


def _filtered(
    rows: Iterator[Numbered], stays: Callable[[Sequence[str]], bool], columns: Sequence[str], tally: _Tally
) -> Iterator[Numbered]:
    for number, row in rows:
        if stays(texts_of(row, columns)):
            yield number, row
        else:
            tally.note("dropped", number)


def _by_function(rows: Iterator[Numbered], function: OwnFunction, steps: Steps, tally: _Tally) -> Iterator[Numbered]:
    for number, row in rows:
        made = function(number, dict(row))
        if made is None:
            tally.note("kept" if steps.keeps_all else "dropped", number)
            if steps.keeps_all:
                yield number, row
            continue
        new = function.checked(number, made, "the row (a dict), or None to drop it; data.augment takes lists")
        if steps.keeps_all and steps.identity in row:
            new = {**new, steps.identity: row[steps.identity]}
        if new != row:
            tally.note("changed", number)
        yield number, new


def _found(rows: Iterator[Numbered], spec: Bm25, column: str, spool: IO[bytes], tally: _Tally) -> Iterator[Numbered]:
    terms = list[list[str]]()
    singles = singles_of(spec)
    places = list(
        _spooled(rows, spool, lambda row: terms.append(search_terms(" ".join(texts_of(row, [column])), singles)))
    )
    if places and not any(terms):
        raise UsageError(
            f"data.select.bm25: no row has a word in column {column!r}; name the one to search with "
            "data.select.bm25.column"
        )
    chosen = set[int]().union(*best_rows(spec, terms)) if places else set[int]()
    yield from _reread(places, chosen, spool, tally)


def _sampled(rows: Iterator[Numbered], size: int, seed: int, spool: IO[bytes], tally: _Tally) -> Iterator[Numbered]:
    places = list(_spooled(rows, spool, lambda row: None))
    yield from _reread(places, sample_of(len(places), size, seed), spool, tally)


def _spooled(
    rows: Iterator[Numbered], spool: IO[bytes], look: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[int, int]]:
    """Write the rows into the spool and yield their numbers and places."""
    for number, row in rows:
        look(row)
        place = spool.tell()
        spool.write(as_line(row))
        yield number, place


def _reread(places: Sequence[tuple[int, int]], chosen: set[int], spool: IO[bytes], tally: _Tally) -> Iterator[Numbered]:
    """Yield the chosen rows, and count the others."""
    for at, (number, place) in enumerate(places):
        if at in chosen:
            spool.seek(place)
            yield number, parse_json(spool.readline())
        else:
            tally.note("dropped", number)
    spool.close()


def as_line(row: Row) -> bytes:
    """Return a row as a line of JSON.

    What JSON does not know, such as a date, becomes text.
    """
    import orjson

    return orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)


def _asked(rows: Iterator[Numbered], function: OwnFunction, tally: _Tally) -> Iterator[Numbered]:
    for number, row in rows:
        stays = function(number, dict(row))
        if type(stays) is not bool:
            function.refuse(number, stays, "True for a row that stays, else False")
        if stays:
            yield number, row
        else:
            tally.note("dropped", number)


_Make = Callable[[int, dict[str, Any], random.Random], Iterable[dict[str, Any]]]


def _with_copies(rows: Iterator[Numbered], make: _Make, spec: Augment, tally: _Tally) -> Iterator[Numbered]:
    for number, row in rows:
        yield number, row
        for copy in range(spec.copies):
            for made in make(number, row, random.Random(f"{spec.seed}/{number}/{copy}")):
                tally.add()
                yield number, made


def _obfuscated(steps: Steps) -> _Make:
    def make(number: int, row: dict[str, Any], chance: random.Random) -> Iterable[dict[str, Any]]:
        target = str(row.get(steps.target_column) or "")
        yield {**row, steps.input_column: hangul.obfuscate(target, chance, hangul.MAIN_MIX)}

    return make


def _made(function: OwnFunction) -> _Make:
    allowed = "a row (a dict), a list of rows, or None for no row"

    def make(number: int, row: dict[str, Any], chance: random.Random) -> Iterable[dict[str, Any]]:
        made = function(number, dict(row), chance) if function.takes_chance else function(number, dict(row))
        rows = [] if made is None else made if type(made) is list else [made]
        return [function.checked(number, one, allowed) for one in rows]

    return make
