"""Generation engines in the jobs: what each of them takes, and what it returns.

The half of an engine that planning reads is in `recipes.generation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ...errors import RunError
from ...recipes.generation import ENGINES

if TYPE_CHECKING:
    from ...recipes.schema import StageSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Token ids to be continued.

    Drawing is seeded by the recipe's seed, *row* (the position in the input), *sample* (which of several answers) and
    the number of a token in its answer, which starts at *first*. *max_characters* lets an engine stop as soon as the
    text is longer; it need not.
    """

    ids: Sequence[int]
    row: int
    max_new_tokens: int
    max_characters: int | None = None
    sample: int = 0
    first: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities of an answer's tokens.

    They are the model's own, before any setting changes them. *chosen* has one number for each token, *top* the
    likeliest (id, log-probability) pairs of each.
    """

    chosen: Sequence[float]
    top: Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What follows a prompt: token ids without the end token.

    It *ended* at a token or text that stops, or at its limit. The ids may go on beyond a stop text or the most
    characters: the text is cut by who decodes it (`generation.texts`).
    """

    ids: list[int]
    ended: Literal["stop", "length"]
    logprobs: TokenLogprobs | None = None


class Engine(Protocol):
    """A loaded model that continues prompts."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return what follows each prompt, in their order.

        It depends on the prompt and the settings alone, not on the prompts that are generated with it.

        Raises:
            RunError: the model's scores of a row are no numbers, or one row is too large for the device's memory.
        """

    def with_settings(self, settings: StageSettings) -> Engine:
        """Return the same loaded model with other settings of `predict`."""


def not_finite(row: int, what: str) -> RunError:
    """Return the error of a *row* whose scores *what* are no numbers."""
    return RunError(
        f"row {row}: the model's scores {what} are not finite numbers (NaN or infinite), so there is nothing to choose "
        "from; the weights are damaged or their training diverged, or predict.dtype=float16 is too narrow for this "
        "model: try predict.dtype=float32"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """A model to load, and where to.

    *model_class* is a class of transformers. The task has *num_devices*, each a *device* of torch: "cpu" or "cuda".
    Arithmetic is in *dtype*.
    """

    settings: StageSettings
    model_dir: Path
    tokenizer: Any
    model_class: str
    device: str
    dtype: str
    num_devices: int = 1


def load_engine(request: LoadRequest) -> Engine:
    """Return the engine of the settings, with the model of the request."""
    module = import_module(ENGINES.load(request.settings.predict.engine).runtime)
    return cast("Engine", module.load(request))
