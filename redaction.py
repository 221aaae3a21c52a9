"""Secrets and folders of this machine, and text without them.

A secret is known by the name of its variable and by its value.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

HIDDEN = "<secret>"

# Shapes that their issuers gave their tokens so that they can be found; each needs more than a plain word has.
_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9_])(?:
        (?:hf|api_org)_[A-Za-z0-9]{16,}                                    # Hugging Face
      | sk-(?:proj|svcacct|admin|ant|or|None)-[A-Za-z0-9_-]{16,} | sk-[A-Za-z0-9]{20,}  # OpenAI, Anthropic
      | (?:gh[oprsu]|github_pat)_[A-Za-z0-9_]{16,} | gl[a-z]{2,4}-[A-Za-z0-9_-]{16,}  # GitHub, GitLab
      | xox[a-z]-[A-Za-z0-9-]{10,}                                         # Slack
      | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])                           # AWS
      | AIza[A-Za-z0-9_-]{35} | npm_[A-Za-z0-9]{36} | pypi-AgEI[A-Za-z0-9_-]{16,} | wandb_v\d_[A-Za-z0-9_]{16,}
      | eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?     # a JSON Web Token
    )
    | -----BEGIN[ ][A-Z0-9 ]*PRIVATE[ ]KEY-----(?:.*?-----END[ ][A-Z0-9 ]*PRIVATE[ ]KEY-----|.*)
    | (?<=Bearer[ ])[A-Za-z0-9._~+/-]{16,}
    """,
    re.VERBOSE | re.DOTALL,
)
_IN_URL = re.compile(
    # user:password@, also where a Path has made one slash of two
    r"(?:(?<=://)|(?<=[a-z0-9]:/))[^/\s:@'\"]*:[^/\s@'\"$]+(?=@)"
    r"|(?<=[?&;])(?:X-Amz-(?:Signature|Security-Token)|sig|signature|access_token|token|api_key|password)=[^&;\s'\"$]+",
    re.IGNORECASE,
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40,}")  # the older ones have no shape but their length

# These words name nothing else. The others may: a limit of tokens, the path of a key, a number of passes.
_ALWAYS = re.compile(r"SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_OFTEN = re.compile(r"TOKEN(?!I[ZS])|(?:^|_)(?:KEY|PAT|PASS|PWD|JWT|AUTH|COOKIE)S?$", re.IGNORECASE)
_HARMLESS = re.compile(r"|true|false|yes|no|on|off|[0-9.]{1,7}|[~/.].*|<.*>", re.IGNORECASE | re.DOTALL)


# The folders before the last name of an absolute path; those of a URL belong to a store.
_FOLDERS = re.compile(r"(?:file://|(?<![\w./~]))(?:~\w*)?/(?:[^\s/'\"`:;,()<>\[\]]+/)*(?=[^\s/])")
# Keys of a recipe that hold texts for the model.
_TEXTS = ("data.prompt", "data.system", "data.examples", "data.separator")


def holds_secret(text: str) -> bool:
    """Say whether a secret stands in *text*.

    A secret is a token, a private key, or a URL with a password.
    """
    return _TOKEN.search(text) is not None or _IN_URL.search(text) is not None


def is_secret(name: str, value: str) -> bool:
    """Say whether the variable *name* with this *value* is a secret, by either."""
    if holds_secret(value) or _ALWAYS.search(name):
        return True
    if "WANDB" in name.upper() and _WANDB_KEY.fullmatch(value):
        return True
    return _OFTEN.search(name) is not None and not _HARMLESS.fullmatch(value)


def redacted(text: str) -> str:
    """Return *text* with each secret in it replaced.

    Words that say how to find the fault stay.
    """
    return _IN_URL.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


def without_folders(text: str) -> str:
    """Return *text* in which only the last name is left of each absolute path."""
    return _FOLDERS.sub("", text)


def without_places(value: Any, key: str = "") -> Any:
    """Return a value of a recipe without folders of this machine.

    *key* is its dotted name: a text for the model stays as it is.
    """
    if key in _TEXTS:
        return value
    if isinstance(value, dict):
        return {name: without_places(one, f"{key}.{name}" if key else name) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(one, key) for one in value]
    if not isinstance(value, str):
        return value
    is_path = value.startswith(("/", "~", "file:"))  # also one with spaces
    return PurePath(value).name if is_path else without_folders(value)
