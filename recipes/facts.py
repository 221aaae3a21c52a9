"""Define what planning finds out about a recipe's model, data and disk.

Pure data, part of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .stage_kinds import RowUse


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class TrainedFacts:
    """Numbers of parameters of a model that was made ready to train.

    Adapters are included. QLoRA holds *quantisable* of the frozen ones in four bits. A checkpoint holds *num_tensors*.
    Where only peft can merge the adapter, it *merges_in_memory*. A model that cannot compute its activations again
    does not *recompute*.
    """

    trainable: int
    frozen: int
    quantisable: int
    num_tensors: int
    merges_in_memory: bool = False
    recomputes: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The facts of the model.

    *digest* covers config, tokenizer and weight headers, not every weight. *tensors* are its parameters in memory, with
    rows for added tokens. *trained* says what each training of the recipe trains, by the digest of the settings that
    decide it. *beside_bytes* are those of its config and tokenizer, which lie with every checkpoint; *cached_bytes* lie
    in a cache already, for a model that was fetched or converted.
    """

    folder: str
    tokenizer_folder: str
    digest: str
    has_weights: bool
    num_params: int
    tensors: tuple[TensorFacts, ...]
    config: dict[str, Any]
    trained: dict[str, TrainedFacts] = field(default_factory=dict)
    beside_bytes: int = 0
    cached_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class SplitPart:
    """A file that a split's file was made of, and its rows."""

    name: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """The facts of a data file.

    *digest* is the sha256 of its bytes. The *nested* columns have a list, an object or bytes in some row. The *parts*
    are the files that it was made of, in order; none where it is the user's own.
    """

    path: str
    num_rows: int
    num_bytes: int
    digest: str
    columns: tuple[str, ...]
    nested: tuple[str, ...] = ()
    parts: tuple[SplitPart, ...] = ()

    @property
    def shown(self) -> str:
        """What messages call the file: its path, or the files that it was made of."""
        if not self.parts:
            return self.path
        more = f" and {len(self.parts) - 2} more files" if len(self.parts) > 2 else ""
        return ", ".join(part.name for part in self.parts[:2]) + more

    def places(self, numbers: Sequence[int]) -> str:
        """Return such as "row 7, 9", with their rows in the files that they came from."""
        return ", ".join(map(self.place, numbers)) if self.parts else f"row {', '.join(map(str, numbers))}"

    def place(self, number: int) -> str:
        """Return such as "row 7", with its row in the file that it came from."""
        before = 0
        for part in self.parts:
            if number <= before + part.num_rows:
                return f"row {number} (row {number - before} of {part.name})"
            before += part.num_rows
        return f"row {number}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The number of rows of some kind, and the numbers of the first, from 1."""

    num: int = 0
    first: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of a stage's rows in tokens, as its job will see them.

    *longest* is a row's length before any cut, *longest_kept* after it; *longest_target* is that of a target that is
    encoded apart from its source. Rows are *long* above *limit*, have an *empty* target, or nothing to *learn* (of
    prompts: no token). *remarks* has the rows of each remark of the task. The *num_rows* give the job *num_examples*.
    Of *num_tokens* that the job sees the tokenizer does not know *num_unknown*.
    """

    stage: str
    use: Literal["train", "eval", "predict"]
    split: str
    limit: int | None
    num_rows: int
    num_examples: int
    longest: int
    longest_kept: int
    longest_target: int = 0
    long: Rows = Rows()
    empty: Rows = Rows()
    unlearnable: Rows = Rows()
    num_tokens: int = 0
    num_unknown: int = 0
    remarks: dict[str, Rows] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """What a step did to the rows of a split.

    Rows were *changed* or *dropped*, or *kept* though the step would drop them, since they are to be predicted.
    """

    name: str
    changed: Rows = Rows()
    dropped: Rows = Rows()
    kept: Rows = Rows()
    added: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A split as the steps of `data` left it, for one *use* in one *stage*.

    *rows* is the file that was written. *sources* are the files of the user's own functions, and their sha256.
    """

    stage: str
    use: RowUse
    split: str
    num_source_rows: int
    rows: SplitFacts
    steps: tuple[StepCount, ...]
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class UsedFile:
    """A user's file that jobs read from a copy; *digest* is its sha256."""

    path: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """The tokens that `model.add_tokens_from` adds.

    *source* is its value. A row of the training text has so many tokens *before* and *after*, on average.
    """

    source: str
    added: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class DiskSpace:
    """The free space of the runs directory, less what other runs were promised.

    *source* is what sets the limit: free space, a quota, or the budget of the directory. *free_bytes* is below 0 by
    what the others hold or were promised beyond that limit.
    """

    folder: str
    free_bytes: int
    free_inodes: int
    source: str = "free space"
    promised_bytes: int = 0
    num_runs: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The facts of a recipe's model, data and disk.

    *versions* are those of the packages that jobs will import. *settings_digest* stands for the settings that decided
    what was read: they are facts of no other recipe. The *labels* of a classification are in the order of the model's
    outputs. The *used_files* are those that change and write predictions, by the names that the recipe gives them.
    """

    model: ModelFacts
    splits: dict[str, SplitFacts]
    disk_space: DiskSpace
    code_digest: str
    versions: dict[str, str] = field(default_factory=dict)
    lengths: tuple[Lengths, ...] = ()
    settings_digest: str = ""
    labels: tuple[str, ...] = ()
    prepared: tuple[Prepared, ...] = ()
    tokens: TokenFacts | None = None
    used_files: dict[str, UsedFile] = field(default_factory=dict)

    def split_of(self, stage: str, use: RowUse, split: str) -> SplitFacts:
        """Return the rows of a split as a stage uses them, prepared or not."""
        found = (one.rows for one in self.prepared if (one.stage, one.use) == (stage, use))
        return next(found, self.splits[split])

    def lengths_of(self, stage: str, use: Literal["train", "eval", "predict"]) -> Lengths | None:
        """Return the lengths of a stage's rows, None where they were not looked at."""
        return next((one for one in self.lengths if (one.stage, one.use) == (stage, use)), None)
