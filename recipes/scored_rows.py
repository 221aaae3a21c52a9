"""Join the merged predictions of a run with the rows that they answer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..errors import NotFoundError
from ..predictions.measure import Case
from ..predictions.rows import predictions_of
from ..predictions.scoring import paired
from ..run_folder import RunPaths
from .data.chat import input_of, target_of
from .data.rows import read_rows
from .plan import Stage
from .tasks import task_of


def cases_of_stage(stage: Stage, paths: RunPaths, decoding: str = "") -> Iterator[Case]:
    """Yield what a score stage measures.

    Each prediction comes with its target and input.

    Raises:
        NotFoundError: the predictions are not merged yet.
        UsageError: they are not as many as the rows.
    """
    assert stage.predict_stage is not None, "a score stage works on the rows of a predict stage"
    path, split, data = (
        paths.predictions_file(stage.predict_stage, decoding),
        stage.splits["score"],
        stage.settings.data,
    )
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: the merge stage has not completed it")
    (target,) = (column.name for column in task_of(stage.settings.task).columns(stage.settings, "score"))
    rows = islice(read_rows(Path(split.path)), split.num_rows)
    for prediction, row in paired(predictions_of(read_rows(path), path), rows):
        yield Case(row=prediction, target=target_of(data, row, target), input=input_of(data, row))
