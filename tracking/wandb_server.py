"""Ask a W&B server who we are there, and how many rows of a run have arrived.

It imports nothing of wandb: one look takes a few milliseconds, and never longer than three seconds.
"""

from __future__ import annotations

import base64
import configparser
import json
import netrc
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

LOOK_S = 3.0
_PUBLIC_URL = "https://api.wandb.ai"
# Names of one server; `wandb login` of wandb 0.31 writes the second into ~/.netrc and looks for both.
_PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_PUBLIC_PAGES = "https://forge.coreweave.com/wandb"
_QUERY = """query RunRows($project: String, $entity: String, $name: String!) {
  viewer { id }
  model(name: $project, entityName: $entity) {
    entity { name }
    bucket(name: $name, missingOk: true) { historyLineCount }
  }
}"""
_SAFE = "=+&$@"  # what W&B leaves as it is in the address of a run


class OutOfReachError(Exception):
    """There is no key, no route, or no answer; the message says which."""


class NoKeyError(OutOfReachError):
    """There is no key for the server."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """What a server has of a run: rows, and the page that shows them.

    Where there is no such run, *page* is "".
    """

    num_rows: int
    page: str = ""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server, and the key or the file with an identity token to log in with."""

    url: str
    key: str = field(default="", repr=False)
    token_file: str = ""

    def look(self, project: str, entity: str | None, run: str) -> Arrived:
        """Return what has arrived of a run.

        Raises:
            OutOfReachError: it is not known within `LOOK_S`.
        """
        data = self.ask(_QUERY, {"project": project, "entity": entity, "name": run})
        if not data.get("viewer"):
            raise OutOfReachError(f"{self.url} refuses the key")
        model = data.get("model") or {}
        owner, bucket = (model.get("entity") or {}).get("name"), model.get("bucket") or {}
        place = "/".join([quote(owner), quote(project), "runs", quote(run, safe=_SAFE)]) if owner and bucket else ""
        return Arrived(num_rows=int(bucket.get("historyLineCount") or 0), page=place and f"{app_url(self.url)}/{place}")

    def ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data that answers a GraphQL query.

        Raises:
            OutOfReachError: there is no answer within `LOOK_S`.
        """

        def ask() -> dict[str, Any]:
            body = json.dumps({"query": query, "variables": variables}).encode()
            headers = {"Content-Type": "application/json", "Authorization": self._authorization()}
            found: dict[str, Any] = _post(f"{self.url}/graphql", body, headers).get("data") or {}
            return found

        return _within_look(ask, self.url)

    def _authorization(self) -> str:
        if self.key:
            return f"Basic {base64.b64encode(f'api:{self.key}'.encode()).decode()}"
        token = Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": token}
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = _post(f"{self.url}/oidc/token", urllib.parse.urlencode(form).encode(), headers)
        return f"Bearer {answer['access_token']}"


def find_server(environment: Mapping[str, str]) -> Server:
    """Return the server that wandb would use.

    Variables, W&B's settings and ~/.netrc name it.

    Raises:
        NoKeyError: there is no key for it.
    """
    home, url = _home(environment), find_url(environment)
    if key := environment.get("WANDB_API_KEY"):
        return Server(url=url, key=key)
    if token_file := environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return Server(url=url, token_file=token_file)
    host = urllib.parse.urlsplit(url).netloc
    paths = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in paths:
        try:
            known = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        for name in (host, *(_PUBLIC_HOSTS if host in _PUBLIC_HOSTS else ())):
            if (found := known.authenticators(name)) and found[2]:
                return Server(url=url, key=found[2])
    raise NoKeyError(f"there is no key for {host}: neither WANDB_API_KEY nor {paths[0]} has one")


def find_url(environment: Mapping[str, str]) -> str:
    """Return the address of the server that wandb would use."""
    given = environment.get("WANDB_BASE_URL") or _settings(environment, _home(environment)) or _PUBLIC_URL
    return given.rstrip("/")


def app_url(url: str) -> str:
    """Return the address of the pages of the server *url*, as wandb does."""
    if urllib.parse.urlsplit(url).hostname in _PUBLIC_HOSTS:
        return _PUBLIC_PAGES
    return re.sub(r"://api\.(wandb\.)?", lambda found: f"://{found[1] or 'app.'}", url)


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HOME", "~")).expanduser()


def _settings(environment: Mapping[str, str], home: Path) -> str:
    """Return the address that `wandb login --host` left."""
    folder = Path(environment.get("WANDB_CONFIG_DIR") or home / ".config/wandb")
    parser = configparser.ConfigParser()
    try:
        parser.read(folder / "settings")
        return parser.get("default", "base_url", fallback="")
    except (OSError, configparser.Error):
        return ""


def _post(url: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    request = urllib.request.Request(url, data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=LOOK_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _within_look(ask: Callable[[], dict[str, Any]], url: str) -> dict[str, Any]:
    """Ask in a thread: looking up a name may take half a minute without a route."""
    answers, problems = list[dict[str, Any]](), list[str]()

    def run() -> None:
        try:
            answers.append(ask())
        except urllib.error.HTTPError as error:
            refused = error.code in (401, 403)
            problems.append(f"{url} refuses the key" if refused else f"{url} answers {error.code}")
        except (OSError, ValueError, KeyError) as error:  # its text may hold what was sent
            problems.append(f"{url} cannot be reached: {getattr(error, 'reason', None) or type(error).__name__}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LOOK_S)
    if not answers:
        raise OutOfReachError(problems[0] if problems else f"{url} does not answer within {LOOK_S:g} s")
    return answers[0]
