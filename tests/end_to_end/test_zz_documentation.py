"""Every command that the README and the help print is run; every link of the documents leads somewhere.

Named to come last: some of these commands remove the run that the other tests look at.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sousbatch.cli.main import build_parser
from sousbatch.cluster.sandbox import build

pytestmark = pytest.mark.xdist_group("finished")
ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._subparsers._group_actions if parser._subparsers else ():
        for inner in action.choices.values():
            yield from parsers(inner)


def printed_commands() -> list[str]:
    """Return each command line that is shown to a user, without its comment; destructive ones last."""
    shown = [line for parser in parsers(build_parser()) for line in parser.format_help().splitlines()]
    shown += re.findall(r"^(?:sousbatch .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    lines = [line.strip() for line in shown if re.match(r" {0,2}sousbatch [a-z]", line)]
    commands = dict.fromkeys(re.split(r"\s+#|\s{3,}", line)[0] for line in lines)
    return sorted(commands, key=lambda command: (" clean " in command, "--all" in command))


@pytest.fixture(scope="module")
def desk(finished):
    """The finished run's place, with the files that the examples name."""
    place, _ = finished
    rows = [{"index": number, "prediction": f"answer {number}"} for number in range(5000)]
    shards = place.root / "shards"
    shards.mkdir()
    for rank in (0, 1):
        lines = [json.dumps(row) + "\n" for row in rows[rank::2]]
        (shards / f"rank{rank}.jsonl").write_text("".join(lines))
    data = [{"input": f"question {number}", "summary": f"answer {number}"} for number in range(5000)]
    (place.root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    for name in "abc":
        (place.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    (place.root / "my_metrics.py").write_text(
        "from sousbatch.predictions.metrics import Metric\n"
        "LENGTH = Metric(score=lambda answers: {'length': [len(text) for text, _ in answers.texts]}, better='lower')\n"
    )
    (place.root / "checkpoint-500").symlink_to(place.run_dir() / "checkpoints/train/step-00000006")
    run_id = place.run_dir().name
    return place, run_id


def arguments_of(command: str, place, run_id: str) -> list[str]:
    words = []
    for word in shlex.split(command)[1:]:
        examples = {"RUN": run_id, "3f2a": run_id[:6], "sweep-81d0": run_id}
        word = examples.get(word, re.sub("3f2a|91cc|77b0|77c1", run_id, word.replace("/data/", f"{place.root}/data/")))
        words += [str(path) for path in sorted(place.root.glob(word))] if "*" in word else [word]
    return words


def is_plain(command: str) -> bool:
    return not re.search(" submit | sandbox | s3://| hf://", command)


WITHOUT_A_KEY = {"sousbatch sync": 1, "sousbatch dashboards diff": 2, "sousbatch dashboards push": 2}


@pytest.mark.parametrize("command", [command for command in printed_commands() if is_plain(command)])
def test_a_printed_command_works(desk, command):
    place, run_id = desk
    shutil.rmtree(place.root / "model", ignore_errors=True)
    codes = [code for beginning, code in WITHOUT_A_KEY.items() if command.startswith(beginning)]
    done = place.run(*arguments_of(command, place, run_id), code=sum(codes))
    assert done.stdout or done.stderr


SUBMISSIONS = dict.fromkeys(command.replace(" --detach", "") for command in printed_commands() if " submit " in command)
# Those that set keys and no more are planned alike; the first stands for them.
STARTED = {re.sub(r" [\w.]+=\S+", "", command): command for command in reversed(SUBMISSIONS)}.values()


@pytest.mark.parametrize("command", STARTED)
def test_a_printed_submission_starts(place, command):
    """It is cancelled once it has been sent: that runs end well is shown elsewhere."""
    place.run(*shlex.split(command)[1:], "--detach")
    assert {state["state"] for state in place.states().values()} <= {"waiting", "running"}
    place.run("cancel", "hangul-restoration")


@pytest.mark.parametrize("command", [command for command in SUBMISSIONS if command not in STARTED])
def test_the_keys_of_a_printed_submission_can_be_planned(place, command):
    place.run(*shlex.split(command.replace(" submit ", " plan "))[1:])


@pytest.mark.slurm
def test_the_printed_sandbox_commands_work(place):
    """In the order of a user; start prints what a shell evaluates."""
    if missing := build.missing_packages(accounting=True):
        pytest.skip(f"Slurm is not here; `{build.install_command(missing)}` installs it")
    shown = [shlex.split(command)[1:] for command in printed_commands() if " sandbox " in command]
    verbs = sorted(shown, key=lambda words: (["start", "status", "stop"].index(words[1]), len(words)))
    folder = Path(tempfile.mkdtemp(prefix="sb-"))
    try:
        for words in verbs:
            done = place.run(*words, "--dir", str(folder / "slurm"))
            assert words[1] != "start" or done.stdout == f"export SLURM_CONF={folder}/slurm/slurm.conf\n"
        assert list(folder.iterdir()) == []
    finally:
        place.run("sandbox", "stop", "--dir", str(folder / "slurm"))
        folder.rmdir()


@pytest.mark.faults
def test_the_commands_of_the_slurm_page_work_in_their_order(place, small, slurm):
    """With a small training as the only stage; RUN is what was submitted last, as the page says."""
    commands = re.findall(r"^sousbatch .*$", (ROOT / "docs/slurm.md").read_text(), re.MULTILINE)
    assert {command.split()[1] for command in commands} >= {"doctor", "plan", "submit", "status", "logs", "resume"}
    run_id = ""
    for command in commands:
        words = [run_id if word == "RUN" else word for word in shlex.split(command)[1:]]
        if "hangul-restoration" in words:
            at = words.index("hangul-restoration") + 1
            words[at:at] = [*small, "stages={train: {}}", "train.steps=300" if "--smoke" not in words else "seed=0"]
        done = place.run(*words)
        if words[0] == "submit":
            run_id = done.stdout.split()[-1]
        if words[:1] == ["logs"]:
            assert "attempt 1" in done.stdout
    states = json.loads(place.run("status", "--json").stdout)
    assert states[0]["state"] == "done"
    assert len(states) == 3


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_the_makefile_has_the_two_commands_of_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile
