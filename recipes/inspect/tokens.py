"""Find the tokens that `model.add_tokens_from` adds to a tokenizer.

They come from a file, or from a SentencePiece model that is trained on the recipe's training text. Run as `python -m
sousbatch.recipes.inspect.tokens`, it reads one JSON request from stdin, so that planning never imports transformers.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...user_folders import cached
from ..data.rows import read_rows
from ..facts import Prepared, SplitFacts, TokenFacts
from ..schema import Recipe
from ..schema.validate import build, to_plain
from ..stages import resolve_stages
from ..tasks import task_of
from .cache import file_digest
from .tokenizer import load_full, tokenizer_digest

_FORMAT = 1  # raised when tokens are found in another way
_KEY = "model.add_tokens_from"
_TRAINED = re.compile(r"spm:([1-9]\d*)")
_MOST_TEXTS, _MEASURED_TEXTS = 200_000, 1000
_SPACE = "\u2581"  # SentencePiece writes a blank so
_NO_PIECE = re.compile(r"<.*>|\[(PAD|UNK|CLS|SEP|MASK)\]")


def find_tokens(
    recipe: Recipe, tokenizer_folder: Path, splits: dict[str, SplitFacts], prepared: Sequence[Prepared]
) -> TokenFacts | None:
    """Return the tokens that the recipe adds from a file or from its data.

    Return None where it names neither. They are found once for the same tokenizer and text.

    Raises:
        UsageError: the file is not there or has no token, or the text has too little.
    """
    named = recipe.model.add_tokens_from
    if named is None:
        return None
    trained = _TRAINED.fullmatch(named)
    texts = _training_texts(recipe, splits, prepared)
    request = {
        "folder": str(tokenizer_folder),
        "add_tokens": recipe.model.add_tokens,
        "trusts_code": recipe.model.trust_remote_code,
        "num_trained": int(trained[1]) if trained else None,
        "file": None if trained else str(_file(named)),
        "texts": [[str(path), columns] for path, columns, _ in texts],
    }
    source = trained[0] if trained else file_digest(_file(named))
    key = [_FORMAT, source, tokenizer_digest(tokenizer_folder), recipe.model.add_tokens]
    key += [[digest, columns] for _, columns, digest in texts]
    found, faults = build(TokenFacts, cached("tokens", key, lambda: _ask(named, request)))
    if found is None:
        raise UsageError(f"the cached tokens of {_KEY} are damaged: {faults[0]}; remove the cache")
    return replace(found, source=named)


def _file(named: str) -> Path:
    path = Path(named).expanduser().absolute()
    if named.startswith("spm:"):
        raise UsageError(f"{_KEY} is {named!r}; write spm:N with the number of tokens to train, such as spm:1000")
    if not path.is_file():
        raise UsageError(
            f"{_KEY} {named!r} does not exist: looked for {path}; give a file with one token a line, a SentencePiece "
            ".model or .vocab, or spm:N to train N tokens on the training text"
        )
    return path


def _training_texts(
    recipe: Recipe, splits: dict[str, SplitFacts], prepared: Sequence[Prepared]
) -> list[tuple[str, list[str], str]]:
    """Return file, columns and digest of the rows of each training.

    The rows are prepared, as they train.
    """
    made = {(one.stage, one.use): one.rows for one in prepared}
    found = {}
    for stage in resolve_stages(recipe).values():
        for rows in stage.rows:
            if rows.use == "train":
                facts = made.get((stage.name, "train"), splits[rows.split])
                columns = [column.name for column in task_of(recipe.task).columns(stage.settings, "train")]
                found[facts.digest] = (facts.path, columns, facts.digest)
    return list(found.values())


def _ask(named: str, request: dict[str, Any]) -> Any:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", f"{__package__}.tokens"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise UsageError(f"{_KEY} {named!r}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Answer the request on stdin."""
    print(json.dumps(to_plain(answer(json.load(sys.stdin)))))


def answer(request: dict[str, Any]) -> TokenFacts:
    """Return the tokens of a request, and what they make of its texts.

    Raises:
        UsageError: there is no token to add.
    """
    folder, given, trusts = Path(request["folder"]), request["add_tokens"], request["trusts_code"]
    tokenizer = load_full(folder, given, trusts_code=trusts)
    texts = list(_even(_texts(request["texts"]), _MOST_TEXTS))
    if request["num_trained"] is not None:
        pieces = _without_known(_trained_pieces(texts, 2 * request["num_trained"]), tokenizer)
        added = list(islice(pieces, request["num_trained"]))
    else:
        added = _of_file(Path(request["file"]), tokenizer)
    if not added:
        raise UsageError("it has no token that the tokenizer does not have already; leave it out")
    measured = list(_even(texts, _MEASURED_TEXTS))
    before = _tokens_a_row(tokenizer, measured)
    tokenizer = load_full(folder, [*given, *added], trusts_code=trusts)
    return TokenFacts(source="", added=tuple(added), before=before, after=_tokens_a_row(tokenizer, measured))


def _texts(places: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Yield the text of each row."""
    for path, columns in places:
        for row in read_rows(Path(path)):
            yield "\n".join(text for column in columns for text in _words(row.get(column)))


def _words(value: Any) -> Iterator[str]:
    """Yield the texts of a value, which may be a list of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _words(value.get("content"))
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)


def _even(texts: Iterable[str], most: int) -> Iterator[str]:
    """Yield at most *most* texts, evenly spread."""
    found = list(texts)
    step = max(1, -(-len(found) // most))
    return iter(found[::step])


def _trained_pieces(texts: Sequence[str], num_pieces: int) -> list[str]:
    """Return the pieces of a SentencePiece model of *texts*, the likeliest first.

    It is trained larger than asked for: each letter of the text is a piece, and pieces that are known are left out.
    """
    sentencepiece = _sentencepiece()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
            model_writer=model,
            vocab_size=num_pieces + len({letter for text in texts for letter in text}) + 1,
            hard_vocab_limit=False,
            num_threads=1,  # the same pieces each time
            normalization_rule_name="identity",
            max_sentence_length=1 << 20,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UsageError(f"SentencePiece cannot train on the text: {' '.join(str(error).split())[:300]}") from error
    return _pieces_of(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


def _pieces_of(processor: Any) -> list[str]:
    ids = range(processor.get_piece_size())
    kept = [
        one for one in ids if not (processor.is_control(one) or processor.is_unknown(one) or processor.is_byte(one))
    ]
    return [processor.id_to_piece(one) for one in sorted(kept, key=lambda one: -processor.get_score(one))]


def _of_file(path: Path, tokenizer: Any) -> list[str]:
    if path.suffix == ".model":
        try:
            processor = _sentencepiece().SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UsageError(f"it is not a SentencePiece model ({' '.join(str(error).split())[:200]})") from error
        return list(_without_known(_pieces_of(processor), tokenizer))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"it is not UTF-8 text: {error}; give one token a line") from error
    if path.suffix == ".vocab":
        pieces = [line.partition("\t")[0] for line in lines]
        return list(_without_known([one for one in pieces if not _NO_PIECE.fullmatch(one)], tokenizer))
    known = tokenizer.get_vocab()
    return [token for token in dict.fromkeys(lines) if token.strip() and token not in known]


def _without_known(pieces: Iterable[str], tokenizer: Any) -> Iterator[str]:
    """Yield pieces as text, without those that the tokenizer has.

    It has what is one token, alone or after a blank.
    """
    known, seen = tokenizer.get_vocab(), set[str]()
    for piece in pieces:
        text = piece.replace(_SPACE, " ").strip()
        if not text or text in seen or text in known:
            continue
        seen.add(text)
        forms = tokenizer([text, f" {text}"], add_special_tokens=False)["input_ids"]
        if all(len(form) > 1 for form in forms):
            yield text


def _tokens_a_row(tokenizer: Any, texts: Sequence[str]) -> float:
    counts = [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
    return round(sum(counts) / max(1, len(counts)), 1)


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UsageError(
            f"it needs the package sentencepiece; {sys.executable} -m pip install sentencepiece"
        ) from error
    return sentencepiece


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(str(error))
