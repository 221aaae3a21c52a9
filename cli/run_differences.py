"""Two runs side by side: what went into each, and what came out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import ledger
from ..errors import UsageError
from ..events import Accepted, of
from ..run_folder import RunPaths
from .tables import format_table, format_value

if TYPE_CHECKING:
    from ..launchers.history import RunRow

_DIGEST_LENGTH = 12
# (key, value in the first run, value in the second); None where a run has none.
Pair = tuple[str, Any, Any]


def describe_differences(runs: Sequence[RunPaths], *, as_json: bool) -> str:
    """Return what differs between two runs, and the results of both.

    Args:
        runs: two runs or points of sweeps.
        as_json: as JSON with `runs`, `inputs` and `results`, in place of a table.

    Raises:
        UsageError: one of them is a sweep, which has a run for each point.
    """
    inputs = [pair for pair in _pairs([dict(_inputs(paths)) for paths in runs]) if pair[1] != pair[2]]
    results = [pair for pair in _pairs([_results(paths) for paths in runs]) if pair[1:] != (None, None)]
    names = [paths.run_id for paths in runs]
    if as_json:
        parts = {"inputs": inputs, "results": results}
        named = {
            part: [{"key": key, "first": first, "second": second} for key, first, second in pairs]
            for part, pairs in parts.items()
        }
        return json.dumps({"runs": names, **named}, indent=1, ensure_ascii=False)
    went_in = [[key, format_value(first), format_value(second)] for key, first, second in inputs]
    came_out = [[key, _number(first), _number(second), _change(first, second)] for key, first, second in results]
    return "\n\n".join(
        [
            format_table(went_in, header=("went in", *names)) if went_in else "nothing that went in differs",
            format_table(came_out, header=("came out", *names, "change")),
        ]
    )


def _inputs(paths: RunPaths) -> Iterator[tuple[str, Any]]:
    """Yield the keys of the recipe, the digests of what was read, and the versions.

    Versions are those at submission, or those that a person accepted later.
    """
    from ..recipes.plan import plan_values
    from ..recipes.reference import flat

    plan = plan_values(paths.plan)
    if plan.get("sweep"):
        raise UsageError(
            f"{paths.run_id} is a sweep: --diff compares two runs, so name points of it by their folders; "
            f"`sousbatch runs {paths.run_id} --json` lists them"
        )
    facts = plan.get("inputs", {})
    yield from flat({key: value for key, value in plan["recipe"].items() if key not in ("name", "description")})
    yield "digest of the model", facts.get("model", {}).get("digest", "")[:_DIGEST_LENGTH]
    for name, split in facts.get("splits", {}).items():
        yield f"digest of data.{name}", split.get("digest", "")[:_DIGEST_LENGTH]
    yield "digest of environment.code", facts.get("code_digest", "")[:_DIGEST_LENGTH]
    accepted = of(ledger.read(paths.ledger_dir, max_steps=1), Accepted)
    yield from (accepted[-1].versions if accepted else facts.get("versions", {})).items()
    yield "sousbatch", plan.get("version")


def _results(paths: RunPaths) -> dict[str, Any]:
    from ..launchers.history import read_history
    from ..launchers.registry import launcher_named

    rows = read_history([paths], launcher_named)
    one: RunRow = rows[0]
    found = {
        "state": one.state,
        "step": one.step or None,
        "loss": one.loss,
        "best": one.best,
        "examples/s": one.examples_per_s,
        "tokens/s": one.tokens_per_s,
        "device GB": one.device_memory_gb,
        "device hours": one.device_hours,
        "held bytes": one.held_bytes,
    }
    for row in rows:
        found |= {f"{name}@{row.decoding}" if row.decoding else name: score for name, score in row.scores.items()}
    return found


def _pairs(sides: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Return every key that a side has, in the order of the first, with both values."""
    first, second = sides
    return [(key, first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _change(first: Any, second: Any) -> str:
    both = isinstance(first, (int, float)) and isinstance(second, (int, float))
    return f"{second - first:+.4g}" if both else ""
