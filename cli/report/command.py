"""`sousbatch report`: write one HTML page about a run, a sweep or several runs."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from ... import files
from ...errors import UsageError
from ...run_index import find_run
from ..parser import RUN_HELP, Parser, define


def define_report(parser: Parser) -> None:
    """Define `report`."""
    define(parser, _report, "report 3f2a", "report sweep-81d0", "report 3f2a 77c1 --out comparison.html")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help=f"{RUN_HELP}; of a sweep all points, of several runs all"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: report.html in the run, or here for several runs)"
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="one run for others, as `publish` sends it: no folder, host, price or time of writing",
    )


def _report(arguments: Namespace) -> int:
    from .gather import gather
    from .page import render_page
    from .portable import portable

    runs = list(dict.fromkeys(find_run(name, newest=True) for name in arguments.runs))
    default = runs[0].report if len(runs) == 1 else Path(runs[0].report.name)
    out = Path(arguments.out).expanduser() if arguments.out else default
    facts, asked = gather(runs)
    if arguments.portable:
        if len(facts) != 1 or asked.num_waiting:
            raise UsageError("--portable takes one run; name one point of a sweep, which `sousbatch runs` lists")
        facts = [portable(facts[0])]
    written_at = None if arguments.portable else time.time()
    files.write_text(out, render_page(facts, out=out.absolute(), written_at=written_at, asked=asked))
    print(out)
    return 0
