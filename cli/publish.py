"""`sousbatch publish`: send what a run made to a folder, a URL, or the hub."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from .. import ledger
from ..errors import UsageError
from ..redaction import holds_secret
from ..run_index import find_run
from .parser import RUN_HELP, Parser, define
from .tables import format_size

_WHAT = ("model", "adapter", "predictions", "report")


def define_publish(parser: Parser) -> None:
    """Define `publish`."""
    define(
        parser,
        _publish,
        "publish 3f2a /data/models/hangul",
        "publish 3f2a s3://bucket/hangul",
        "publish 3f2a hf://my-team/hangul --what model",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="folder, fsspec URL or hf://OWNER/NAME (default: the recipe's publish.url)",
    )
    parser.add_argument("--what", nargs="+", choices=_WHAT, help="what is sent (default: the recipe's publish.what)")
    parser.add_argument("--public", action="store_true", help="a repository that it makes on the hub is public")


def _publish(arguments: Namespace) -> int:
    from ..events import Published
    from ..jobs.publication import gather
    from ..publishing.send import send
    from ..publishing.store import open_store, refusal_of
    from ..recipes.plan import read_plan

    paths = find_run(arguments.run, newest=True)
    plan = read_plan(paths.plan)
    if plan.sweep is not None:
        raise UsageError(f"{arguments.run} is a sweep; name the run of one of its points, `sousbatch runs` lists them")
    spec = plan.recipe.publish
    url = arguments.url or spec.url
    if url is None:
        raise UsageError(f"run {paths.run_id} has no publish.url; name a folder, a URL or hf://OWNER/NAME")
    if holds_secret(url):
        raise UsageError("the URL holds a secret, which would be written; leave it out, and export it")
    if "://" not in url and (mistyped := re.match(r"[a-z][a-z0-9]*:/*", url)):
        raise UsageError(f"{url!r} is no URL, which begins with {mistyped[0].rstrip('/')}//; ./{url} is a folder here")
    url = url if "://" in url else os.path.abspath(os.path.expanduser(url))
    if refusal := refusal_of(url):
        raise UsageError(f"{url} {refusal}")
    models = [stage.name for stage in plan.stages if stage.record.leaves == "model"]
    what = arguments.what or spec.what
    with tempfile.TemporaryDirectory(prefix="sousbatch-") as folder:
        work = Path(folder)
        model_stage = models[-1] if models else None
        contents = gather(paths, plan, what, model_stage=model_stage, stages=plan.stages, work=work)
        store = open_store(url, is_private=spec.private and not arguments.public)
        done = send(contents.about, contents.files, store, work=work, say=_say)
    client = ledger.open_client(paths.ledger_dir)
    client.write(Published(url=url, num_files=done.num_files, num_bytes=done.num_bytes, digest=contents.about["model"]))
    client.close()
    print(f"{url}: {done.num_files} files, {format_size(done.num_bytes)}, {done.num_sent} of them sent now")
    return 0


def _say(text: str) -> None:
    print(f"sousbatch: {text}", file=sys.stderr, flush=True)
