"""Count the tokens of every row before anything is queued.

It also shows rows as the jobs see them. Run as `python -m sousbatch.recipes.inspect.lengths`, it reads one JSON request
from stdin: that is how planning uses tokenizers that only transformers knows. It prints a JSON line as it goes, and the
answer as the last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ... import files
from ...errors import UsageError
from ...user_folders import recall, remember
from ..data.chat import RowFault
from ..data.encode import BATCH_ROWS, Encoded, is_kept
from ..data.packing import for_use, num_blocks, packs_of
from ..data.prompts import has_turns
from ..data.rows import read_rows
from ..data.statistics import LengthCounts
from ..facts import Lengths, ModelFacts, Prepared, Rows, SplitFacts
from ..schema import Data, Recipe, StageSettings, validate
from ..stages import resolve_stages
from ..tasks import task_of
from .tokenizer import load_full, load_light, tokenizer_digest, unknown_id

Progress = Callable[[str, int, int], None]  # what is counted, rows done, rows in all
Use = Literal["train", "eval", "predict"]

_FORMAT = 8  # raised when rows are counted in another way
_NUM_NAMED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsToCount:
    """Rows to count: those of *split*, for *use* in *stage*.

    A row is long above *limit*.
    """

    stage: str
    use: Use
    split: str
    path: str
    digest: str
    num_rows: int
    limit: int | None
    settings: StageSettings

    @property
    def what(self) -> str:
        """The text of a progress line."""
        return f"rows of {self.split}"


def rows_to_count(
    recipe: Recipe, model: ModelFacts, splits: dict[str, SplitFacts], prepared: Sequence[Prepared]
) -> list[RowsToCount]:
    """Return what the recipe's stages read as tokens."""
    made = {(one.stage, one.use): one.rows for one in prepared}
    return [
        RowsToCount(
            stage=stage.name,
            use=rows.use,
            split=rows.split,
            path=facts.path,
            digest=facts.digest,
            num_rows=rows.num_rows(facts.num_rows),
            limit=task_of(recipe.task).longest(stage.settings, rows.use, model.config),
            settings=for_use(stage.settings, rows.use),
        )
        for stage in resolve_stages(recipe).values()
        for rows in stage.rows
        if rows.use != "score"  # it compares texts
        for facts in (made.get((stage.name, rows.use), splits[rows.split]),)
    ]


def count_lengths(
    recipe: Recipe,
    model: ModelFacts,
    splits: dict[str, SplitFacts],
    prepared: Sequence[Prepared] = (),
    progress: Progress | None = None,
) -> tuple[Lengths, ...]:
    """Return the lengths of all rows that the recipe's stages read.

    They are remembered by the digests of what decides them.

    Raises:
        UsageError: the tokenizer cannot be loaded or cannot take the rows.
    """
    found = []
    for one, values in count_rows(recipe, model, splits, prepared, progress):
        place = {"stage": one.stage, "use": one.use, "split": one.split, "limit": one.limit}
        counted = {name: value for name, value in values.items() if name != "statistics"}
        lengths, faults = validate.build(Lengths, {**counted, **place})
        if lengths is None:
            raise UsageError(f"the cached counts of {one.path} are damaged: {faults[0]}; remove the cache")
        found.append(lengths)
    return tuple(found)


def count_rows(
    recipe: Recipe,
    model: ModelFacts,
    splits: dict[str, SplitFacts],
    prepared: Sequence[Prepared],
    progress: Progress | None = None,
) -> list[tuple[RowsToCount, dict[str, Any]]]:
    """Return what was counted of all rows, as plain values of `Lengths`.

    Beside them are the counts of each length, under "statistics".
    """
    folder = Path(model.tokenizer_folder)
    wanted = rows_to_count(recipe, model, splits, prepared)
    decides = [_FORMAT, tokenizer_digest(folder), recipe.model.add_tokens]
    keys = [files.digest_of([decides, _deciding(one), one.digest]) for one in wanted]
    known = {key: recall("lengths", key) for key in keys}
    missing = {key: one for key, one in zip(keys, wanted, strict=True) if known[key] is None}
    if missing:
        for key, value in zip(missing, _ask(recipe, model, splits, list(missing.values()), 0, progress), strict=True):
            remember("lengths", key, value)
            known[key] = value
    return [(one, known[key]) for key, one in zip(keys, wanted, strict=True)]


def show_samples(
    recipe: Recipe, model: ModelFacts, splits: dict[str, SplitFacts], prepared: Sequence[Prepared], count: int
) -> str:
    """Return the first *count* rows of each split as the jobs see them.

    They show what is masked, and what is learned.
    """
    asked = [
        dataclasses.replace(one, num_rows=min(count, one.num_rows))
        for one in rows_to_count(recipe, model, splits, prepared)
    ]
    return "\n\n".join(_ask(recipe, model, splits, asked, count, None))


def _deciding(one: RowsToCount) -> list[Any]:
    """Return what decides the lengths, beside the rows and the tokenizer.

    Evaluation and training read alike.
    """
    task = task_of(one.settings.task)
    read = {section: validate.to_plain(getattr(one.settings, section)) for section in task.reads}
    if "data" in read:
        read["data"] |= {"splits": None, "clean": None, "select": None, "augment": None}  # the digest has their rows
    return [task.name, task.version, one.use == "predict", one.num_rows, one.limit, read]


def _ask(
    recipe: Recipe,
    model: ModelFacts,
    splits: dict[str, SplitFacts],
    wanted: list[RowsToCount],
    count: int,
    progress: Progress | None,
) -> list[Any]:
    """Count with the light tokenizer where it knows the ids.

    Otherwise count in a process of its own.
    """
    folder = Path(model.tokenizer_folder)
    tokenizer = None
    if not any(has_turns(one.settings.data.prompt) for one in wanted):
        tokenizer = load_light(folder, recipe.model.add_tokens)
    if tokenizer is not None:
        if reason := _lack(wanted, tokenizer):
            raise _unreadable(folder, reason)
        report = progress or (lambda what, done, total: None)
        return [_answer(one, tokenizer, count, report) for one in wanted]
    request = {
        "folder": str(folder),
        "add_tokens": recipe.model.add_tokens,
        "trusts_code": recipe.model.trust_remote_code,
        "count": count,
        "wanted": [validate.to_plain(one) for one in wanted],
    }
    answers = _ask_process(request, folder, progress)
    for one, answer in zip(wanted, answers, strict=False):
        if isinstance(answer, dict) and "fault" in answer:
            place = splits[one.split].place(answer["row"])
            raise UsageError(f"{place} of split {one.split!r} {answer['fault']}")
    return answers


def _ask_process(request: dict[str, Any], folder: Path, progress: Progress | None) -> list[Any]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", f"{__package__}.lengths"]
    # The request and the complaints are files: a pipe that nobody reads or writes any more would block or break.
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+") as complaints:
        json.dump(request, asked)
        asked.seek(0)
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message = _message(line)
                if "answer" in message:
                    return list(message["answer"])
                if progress is not None and "what" in message:
                    progress(message["what"], message["done"], message["total"])
        complaints.seek(0)
        reason = (complaints.read().strip().splitlines() or ["no reason given"])[-1]
    raise _unreadable(folder, reason)


def _unreadable(folder: Path, reason: str) -> UsageError:
    return UsageError(f"the rows cannot be read with the tokenizer in {folder}: {reason}")


def _lack(wanted: Sequence[RowsToCount], tokenizer: Any) -> str:
    """Return which token the tasks need and the tokenizer lacks, "" for none."""
    if tokenizer.eos_token_id is not None:
        return ""
    write = 'write "eos_token" into its tokenizer_config.json, or set model.tokenizer to another'
    if any(task_of(one.settings.task).generates for one in wanted):
        return f"it has no end token, so that no answer would end; {write}"
    return f"it has neither a padding token nor an end token; {write}" if tokenizer.pad_token_id is None else ""


def _message(line: str) -> dict[str, Any]:
    """Return what a line of the process says.

    A model's own code may print lines that say nothing to us.
    """
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def main() -> None:
    """Answer the request on stdin."""
    request = json.loads(sys.stdin.read())
    tokenizer = load_full(Path(request["folder"]), request["add_tokens"], trusts_code=request["trusts_code"])

    def report(what: str, done: int, total: int) -> None:
        print(json.dumps({"what": what, "done": done, "total": total}), flush=True)

    asked = []
    for values in request["wanted"]:
        wanted, faults = validate.build(RowsToCount, values)
        assert wanted is not None, faults
        asked.append(wanted)
    if reason := _lack(asked, tokenizer):
        sys.exit(reason)
    answers = []
    for wanted in asked:
        try:
            answers.append(_answer(wanted, tokenizer, request["count"], report))
        except RowFault as fault:
            answers.append({"fault": fault.problem, "row": fault.number})
            break
        except UsageError as error:
            sys.exit(str(error))
    print(json.dumps({"answer": answers}), flush=True)


def _answer(wanted: RowsToCount, tokenizer: Any, count: int, report: Progress) -> Any:
    rows = _encoded(wanted, tokenizer, report)
    if count:
        return "\n\n".join(_shown(wanted, number, row, tokenizer) for number, row in enumerate(rows, 1))
    return _counted(wanted, rows, unknown_id(tokenizer))


def _encoded(wanted: RowsToCount, tokenizer: Any, report: Progress) -> Iterator[Encoded]:
    task, rows, done = task_of(wanted.settings.task), islice(read_rows(Path(wanted.path)), wanted.num_rows), 0
    while batch := list(islice(rows, BATCH_ROWS)):
        try:
            yield from task.encode(wanted.settings, wanted.use, batch, tokenizer, wanted.limit)
        except RowFault as fault:
            raise RowFault(done + fault.number, fault.problem) from fault
        done += len(batch)
        report(wanted.what, done, wanted.num_rows)


def _counted(wanted: RowsToCount, rows: Iterator[Encoded], unknown: int | None) -> dict[str, Any]:
    """Count rows of each kind, and examples.

    Of any number of rows a few numbers are kept.
    """
    data, is_prompt = wanted.settings.data, wanted.use == "predict"
    policy, is_joined = data.long_rows, data.packing == "blocks"
    seen: dict[str, tuple[int, list[int]]] = {"long": (0, []), "empty": (0, []), "unlearnable": (0, [])}
    total, longest, longest_target, num_unknown, kept = 0, 0, 0, 0, array("i")

    statistics = LengthCounts()

    def note(kind: str, number: int) -> None:
        num, first = seen.get(kind, (0, []))
        seen[kind] = (num + 1, [*first, number] if len(first) < _NUM_NAMED else first)

    for row in rows:
        total, longest = total + row.is_first, max(longest, row.num_tokens)
        longest_target = max(longest_target, row.num_target_tokens)
        if row.is_long:
            note("long", total)
        if row.is_empty:
            note("empty", total)
        for remark in row.remarks:
            note(remark, total)
        is_left_out = row.is_long and policy in ("refuse", "drop") and not is_prompt
        is_used = is_prompt or is_kept(data, row)
        if not is_left_out and not (row.ids if is_prompt else row.num_learned) and not (is_used and is_joined):
            note("unlearnable", total)
        if is_used:
            kept.append(len(row.ids))
            num_unknown += 0 if unknown is None else row.ids.count(unknown)
        statistics.add(
            num_tokens=row.num_tokens,
            num_kept=len(row.ids) if is_used else None,
            num_prompt=len(row.ids) - row.num_learned,
            num_learned=0 if is_prompt or row.label is not None else row.num_learned,  # a label has no tokens
            num_target=row.num_target_tokens,
        )
    rows_of = {kind: validate.to_plain(Rows(num=num, first=tuple(first))) for kind, (num, first) in seen.items()}
    kinds = {kind: rows_of.pop(kind) for kind in ("long", "empty", "unlearnable")}
    num_examples, longest_kept = _examples(data, kept)
    lengths = {"longest": longest, "longest_kept": longest_kept, "longest_target": longest_target}
    return {
        "num_rows": total,
        "num_examples": num_examples,
        **lengths,
        "num_tokens": sum(kept),
        "num_unknown": num_unknown,
        **kinds,
        "remarks": rows_of,
        "statistics": statistics.to_plain(),
    }


def _examples(data: Data, lengths: Sequence[int]) -> tuple[int, int]:
    """Return how many examples rows of these lengths give, and the longest."""
    if data.packing == "blocks":
        return num_blocks(sum(lengths), data.max_tokens), min(sum(lengths), data.max_tokens)
    if data.packing == "rows":
        sums = [sum(lengths[row] for row in pack) for pack in packs_of(lengths, data.max_tokens)]
        return len(sums), max(sums, default=0)
    return len(lengths), max(lengths, default=0)


def _shown(wanted: RowsToCount, number: int, row: Encoded, tokenizer: Any) -> str:
    """Return a row as text, from its ids."""
    head = f"{wanted.stage}, split {wanted.split}, row {number}: {len(row.ids)} tokens"
    if wanted.use != "predict":
        head += f", {row.num_learned} learned" if is_kept(wanted.settings.data, row) else ", not used for training"
    elif row.is_long and wanted.settings.data.long_rows in ("refuse", "drop"):
        head += ", too long"
    if row.is_long:
        head += f" ({row.num_tokens} before data.long_rows={wanted.settings.data.long_rows})"
    if wanted.use == "predict":
        return "\n".join([head, *_marked("prompt", tokenizer.decode(row.ids))])
    parts = (_marked("learned" if is_learned else "masked", tokenizer.decode(ids)) for is_learned, ids in row.parts)
    label = _marked("label", row.label) if row.label is not None else []
    return "\n".join([head, *(line for lines in parts for line in lines), *label])


def _marked(word: str, text: str) -> list[str]:
    return [f"  {word:7} | {line}" for line in text.split("\n")]


if __name__ == "__main__":
    main()
