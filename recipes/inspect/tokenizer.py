"""Load a model's tokenizer, full or light.

The full one is that of transformers, as the jobs use it; the light one has the same ids. Importing transformers takes 4
s and brings torch, which planning must not wait for. Where `tokenizer.json` says all, the `tokenizers` package alone
gives the same ids; `load_light` returns None where it may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import files

# These classes of transformers take tokenizer.json as it stands; the others build their own from its parts.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Models for which transformers 5.23 takes a class of theirs, whatever tokenizer_config.json says.
_OF_THEIR_OWN = ("hyperclovax_vision_v2", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "siglip2")
# Keys of tokenizer_config.json that make transformers change what tokenizer.json says.
_CHANGING = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "auto_map",
    "fix_mistral_regex",
)
# Patterns of the small files of a model, those of its tokenizer among them: Marian's are .spm, PhoBERT's bpe.codes.
TOKENIZER_KINDS = ("*.json", "*.model", "*.spm", "*.codes", "*.tokenizer", "*.tiktoken", "*.txt", "*.jinja")
_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_full(folder: Path, add_tokens: Sequence[str], *, trusts_code: bool) -> Any:
    """Return the tokenizer of *folder* as the jobs use it.

    The recipe's tokens are added.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code)
    tokenizer.num_known = len(tokenizer)  # ids from here on are new to the model
    if add_tokens:
        tokenizer.add_tokens(list(add_tokens))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def unknown_id(tokenizer: Any) -> int | None:
    """Return the id of unknown text, None where it has no id of its own.

    GPT-2's is that of its end token.
    """
    found: int | None = tokenizer.unk_token_id
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if found in others else found


class LightTokenizer:
    """The tokenizer that `encode` needs, over the `tokenizers` package."""

    def __init__(self, inner: Any, specials: dict[str, str | None]) -> None:
        self.backend_tokenizer = inner  # as transformers calls it
        ids = {name: None if text is None else inner.token_to_id(text) for name, text in specials.items()}
        self.bos_token_id: int | None = ids["bos_token"]
        self.eos_token_id: int | None = ids["eos_token"]
        self.cls_token_id: int | None = ids["cls_token"]
        self.unk_token_id: int | None = ids.get("unk_token")
        self.pad_token_id: int | None = ids["pad_token"] if ids["pad_token"] is not None else ids["eos_token"]

    def __call__(
        self, text: Sequence[str] = (), *, text_target: Sequence[str] = (), add_special_tokens: bool = True
    ) -> dict[str, list[list[int]]]:
        """Return {"input_ids": ids of each text}.

        A target is encoded as any other text is.
        """
        found = self.backend_tokenizer.encode_batch_fast([*text, *text_target], add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in found]}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids*, special tokens included."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=False))


def load_light(folder: Path, add_tokens: Sequence[str]) -> LightTokenizer | None:
    """Return a light tokenizer with the ids of the full one.

    Return None where only transformers knows them.
    """
    try:
        config, described = (
            files.read_json(folder / "tokenizer_config.json"),
            files.read_json(folder / "tokenizer.json"),
        )
        kind = files.read_json(path).get("model_type") if (path := folder / "config.json").is_file() else None
        known = {token["content"] for token in described.get("added_tokens") or []}
        specials = {name: _text(config.get(name)) for name in _SPECIALS}
        others = [_text(token) for token in (config.get("added_tokens_decoder") or {}).values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    is_plain = config.get("tokenizer_class") in _PLAIN_CLASSES and not any(config.get(name) for name in _CHANGING)
    is_plain = is_plain and kind not in _OF_THEIR_OWN
    has_more = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    is_complete = {text for text in (*specials.values(), *others) if text is not None} <= known
    if add_tokens or has_more or not is_plain or not is_complete or (folder / "special_tokens_map.json").exists():
        return None
    from tokenizers import Tokenizer

    try:
        inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the package has no narrower class; transformers may know the file, or says why not
        return None
    inner.no_truncation()
    inner.no_padding()
    return LightTokenizer(inner, specials)


def _text(token: Any) -> str | None:
    """Return the text of a special token.

    Configs write it plainly or as an object.
    """
    return str(token["content"]) if isinstance(token, dict) else None if token is None else str(token)


def tokenizer_digest(folder: Path) -> str:
    """Return the identity of all that decides a tokenizer's ids."""
    from .cache import file_digest

    kinds = (*TOKENIZER_KINDS, "*.py")
    found = sorted({path for kind in kinds for path in folder.glob(kind) if not path.name.endswith(".index.json")})
    return files.digest_of([(path.name, file_digest(path)) for path in found])
