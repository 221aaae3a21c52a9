"""Bad input is answered in one clear line, and every command that help prints is one."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cli.main import build_parser, main
from sousbatch.launchers import submission
from sousbatch.recipes.plan import Plan
from sousbatch.run_folder import PLAN_FORMAT, RunPaths

Run = Callable[..., tuple[int, str, str]]


def _said(run: Run, *arguments: str) -> str:
    """Return the one line that a command which cannot work leaves on stderr."""
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n"), err[:11]) == (2, "", 1, "sousbatch: "), err
    return err


BAD_RECIPES = {
    "unknown recipe": (["smal"], "recipe 'smal' is unknown; known: classification, "),
    "an override first": (["seed=2", "small"], "'seed=2' is an override; a recipe comes before it"),
    "no such file": (["./smal.yaml"], "recipe file './smal.yaml' does not exist"),
    "unknown key": (["small.yaml", "trian.steps=1"], "trian is not a key (did you mean 'train'?)"),
    "word of transformers": (["small.yaml", "num_train_epochs=3"], "here it is train.epochs"),
    "word of a colleague": (["small.yaml", "train.lr=1"], "here it is train.learning_rate"),
    "unknown task": (
        ["small.yaml", "task=causal"],
        "task is 'causal'; known: causal_lm, seq2seq, classification, question_answering (did you mean 'causal_lm'?)",
    ),
    "task of another kind": (
        ["small.yaml", "task=seq2seq"],
        "which has no ModelForSeq2SeqLM in transformers; set task=causal_lm",
    ),
    "no such model": (["small.yaml", "model.path=./none"], "model.path './none' does not exist"),
    "missing split": (["small.yaml", "predict.split=tets"], "is not in data.splits; known: train, validation, test"),
    "missing column": (["small.yaml", "data.columns.target=answer"], "has no column 'answer' (data.columns.target)"),
    "batch and ranks": (["small.yaml", "train.micro_batch=3"], "is not divided by 1 ranks x train.micro_batch 3"),
    "no GPU": (["small.yaml", "resources.default.device=gpu", "stages={train: {}}"], "set resources.train.device=cpu"),
    "not an override": (["small.yaml", "seed"], "seed is not an override"),
    "unknown option": (["small.yaml", "--jsn"], "'--jsn' is not an option or argument of plan"),
    "no recipe": ([], "the following arguments are required: RECIPE"),
}


@pytest.mark.parametrize(("arguments", "line"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_plan_that_cannot_work_is_answered_in_one_line(
    sousbatch: Run, project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr("sousbatch.cluster.site.visible_gpus", tuple)
    if "column" in line:  # it is missing in every split
        arguments = [*arguments, "stages={train: {set: {train: {eval_split: null}}}}"]
    assert line in _said(sousbatch, "plan", *arguments)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "is empty; it needs at least one row"),
        ('{"input": "a", "target": "b"}\n{"input": \n', "test.jsonl, line 2 is not JSON"),
        ("not JSON\n", "test.jsonl, line 1 is not JSON"),
        ('{"input": "a", "target": "b"}\n{"target": "b"}\n', "row 2 of split 'test' has no column 'input'"),
    ],
    ids=["empty", "broken line", "no JSON", "row without a column"],
)
def test_a_bad_data_file_is_answered_in_one_line(sousbatch: Run, project: Path, content: str, line: str) -> None:
    (project / "test.jsonl").write_text(content)
    assert line in _said(sousbatch, "plan", "small.yaml")


@pytest.mark.parametrize("command", ["plan", "submit"])
def test_no_room_is_answered_in_one_line(
    sousbatch: Run, project: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    real = os.statvfs
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full if str(path).endswith("project'") else real(path))
    said = _said(sousbatch, command, "small.yaml", "--runs", "runs")
    assert "not enough space: not even the weights of stage 'train', " in said and "another folder with --runs" in said
    assert not (project / "runs").exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB that is full."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        (folder / "full").write_bytes(bytes(64 * 1024))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("variable", "words"),
    [("SOUSBATCH_CACHE", "is full; free some space, or set sousbatch_cache"), ("SOUSBATCH_RUNS", "not enough space: ")],
)
def test_a_full_disk_is_answered_in_one_line(
    sousbatch: Run, project: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch, variable: str, words: str
) -> None:
    monkeypatch.setenv(variable, str(full_disk))
    assert words in _said(sousbatch, "plan", "small.yaml").lower()


def test_a_folder_that_cannot_be_made_is_answered_in_one_line(
    sousbatch: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "file").write_text("")
    monkeypatch.setenv("SOUSBATCH_CACHE", str(project / "file" / "cache"))
    assert str(project / "file") in _said(sousbatch, "plan", "small.yaml")


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume", "clean"])
def test_an_unknown_run_is_answered_in_one_line(sousbatch: Run, command: str) -> None:
    assert "run '3f2a' does not exist; newest known: none yet" in _said(sousbatch, command, "3f2a")


def test_a_run_of_another_version_is_told_and_kept_but_not_gone_on_with(sousbatch: Run, tmp_path: Path) -> None:
    run = tmp_path / "toy" / "3f2a"
    run.mkdir(parents=True)
    stage = {"name": "train", "kind": "train", "num_tasks": 1, "batch": None}
    plan = {"recipe": {"name": "toy"}, "site": {"launcher": "local"}, "stages": [stage]}
    (run / "plan.json").write_text(json.dumps(plan | {"format": 2, "version": "0.3.0"}))
    refusal = "was made by sousbatch 0.3.0 with plan format 2"
    for command in ("status", "cancel"):
        code, out, err = sousbatch(command, str(run))
        assert code == 0 and refusal in out + err
    assert refusal in _said(sousbatch, "resume", str(run))
    assert sousbatch("logs", str(run)) == (0, "", "sousbatch: train has printed nothing yet\n")
    assert "--all removes the whole run" in _said(sousbatch, "clean", str(run))
    code, _, _ = sousbatch("report", str(run))
    assert code == 0 and refusal in (run / "report.html").read_text()
    assert sousbatch("clean", str(run), "--all")[0] == 0 and not run.exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 99_999, f'{{"format": {PLAN_FORMAT}}}', f'{{"format": {PLAN_FORMAT}, "recipe": 5}}']
)
def test_a_damaged_plan_is_told_and_refused_where_it_is_needed(sousbatch: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    code, out, err = sousbatch("status", str(tmp_path))
    assert (code, err) == (0, "") and "plan.json is damaged" in out
    assert "plan.json is damaged" in _said(sousbatch, "resume", str(tmp_path))


BAD_USE = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["plam"], "sousbatch has no command 'plam'; known: recipes, plan"),
    "nearest command": (["plam"], "(did you mean 'plan'?)"),
    "no verb": (["recipes"], "the following arguments are required: VERB"),
    "unknown verb": (["recipes", "sow"], "(did you mean 'show'?)"),
    "nothing to show": (["recipes", "show"], "name a recipe, or ask for --keys"),
    "nothing to clean": (["clean"], "clean takes a run or --older AGE"),
    "no age": (["clean", "--older", "30"], "--older must be an age such as 30d or 12h, not '30'"),
    "no checkpoints": (["checkpoints", "verify", ".."], "no checkpoints in .."),
    "no such folder": (["checkpoints", "list", "none"], "'none' is neither a folder nor a run"),
    "no checkpoint": (["checkpoints", "consolidate", "none", "out"], "none: no such folder"),
    "no size": (
        ["checkpoints", "consolidate", "a", "b", "--max-shard-gb", "nan"],
        "must be a number above 0, not 'nan'",
    ),
    "no share": (
        ["checkpoints", "consolidate", "a", "b", "--shard", "8/8"],
        "must be I/N with I from 0 to N - 1, such as 0/8, not '8/8'",
    ),
    "a share below nothing": (
        ["checkpoints", "consolidate", "a", "b", "--shard", "-1/2"],
        "--shard needs a value (I/N)",
    ),
    "no workers": (
        ["checkpoints", "consolidate", "a", "b", "--workers", "-3"],
        "must be a non-negative integer, not '-3'",
    ),
    "fewer than no best": (
        ["checkpoints", "prune", "a", "--keep-best", "-1"],
        "must be a non-negative integer, not '-1'",
    ),
    "no last": (["checkpoints", "prune", "a", "--keep-last", "0"], "must be a positive integer, not '0'"),
    "no protocol": (["checkpoints", "consolidate", "nosuch://a", "b"], "nosuch"),
    "kept and merged": (
        ["checkpoints", "consolidate", "a", "b", "--adapter", "keep", "--base", "c"],
        "contradict each other",
    ),
    "no dtype": (["checkpoints", "consolidate", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
    "no shards": (["predictions", "merge", "none.jsonl", "--out", "o"], "none.jsonl: no such file or folder"),
    "no count": (
        ["predictions", "merge", "a", "--out", "o", "--rows", "-1"],
        "must be a non-negative integer, not '-1'",
    ),
    "no data": (["predictions", "score", "test.jsonl", "--data", "none"], "'none' does not exist"),
    "no field": (
        ["predictions", "score", "test.jsonl", "--data", "test.jsonl"],
        "row 1 of test.jsonl has no 'prediction'",
    ),
}


@pytest.mark.parametrize(("arguments", "line"), BAD_USE.values(), ids=BAD_USE)
def test_wrong_usage_is_answered_in_one_line(sousbatch: Run, project: Path, arguments: list[str], line: str) -> None:
    assert line in _said(sousbatch, *arguments)


def test_several_faults_come_in_one_list(sousbatch: Run, project: Path) -> None:
    code, out, err = sousbatch("plan", "small.yaml", "trian=1", "train.lr=1")
    assert (code, out) == (2, "")
    assert err == (
        "sousbatch: recipe 'small' has 2 faults:\n"
        "  train.lr is another library's word (here it is train.learning_rate)\n"
        "  trian is not a key (did you mean 'train'?)\n"
    )


def test_overrides_may_stand_on_both_sides_of_an_option(sousbatch: Run, project: Path) -> None:
    code, out, _ = sousbatch("plan", "small.yaml", "train.steps=7", "--json", "seed=5")
    plan = json.loads(out)
    assert (code, plan["recipe"]["train"]["steps"], plan["recipe"]["seed"]) == (0, 7, 5)


def test_a_plan_shows_stages_data_storage_and_memory(sousbatch: Run, project: Path) -> None:
    code, out, err = sousbatch("plan", "small.yaml")
    heads = [part.split("\n")[0].split("  ")[0] for part in out.split("\n\n")[1:]]
    memory = ["memory of a rank of train", "memory of a device of predict"]
    assert (code, err, heads) == (0, "", ["stage", "data", "all rows checked", "storage", *memory])
    assert "6 steps of 4 rows = 1 ranks x 1 x 4" in out


def test_a_plan_says_what_share_of_the_model_trains(
    sousbatch: Run, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))  # where no other test left what this model is

    def built(question: dict[str, Any]) -> dict[str, Any]:
        numbers = {"trainable": 1_234_567, "frozen": 133_765_433, "quantisable": 0, "num_tensors": 4}
        trained = dict.fromkeys(question["trainings"], numbers)
        return {"config": {}, "tensors": [["a", [5]]], "untied": [], "trained": trained}

    monkeypatch.setattr("sousbatch.recipes.inspect.model._run_architecture", built)
    _, out, _ = sousbatch("plan", "small.yaml", "adapter=lora")
    assert out.splitlines()[0].endswith(", 5 parameters, trains 1.23 M of 135 M parameters (0.91 %)")


def test_a_script_is_what_each_stage_is_sent(sousbatch: Run, project: Path) -> None:
    code, out, _ = sousbatch("plan", "small.yaml", "--script")
    assert code == 0 and re.findall(r"stage (\w+)$", out, re.MULTILINE) == [
        "train",
        "consolidate",
        "predict",
        "merge",
        "score",
    ]


def test_a_shown_recipe_is_a_recipe(sousbatch: Run, project: Path) -> None:
    _, first, _ = sousbatch("recipes", "show", "small.yaml", "data.prompt='Q: {input}'")
    (project / "shown.yaml").write_text(first)
    assert sousbatch("recipes", "show", "shown.yaml") == (0, first, "")


def test_a_shown_recipe_keeps_the_order_of_keys(sousbatch: Run, project: Path) -> None:
    _, out, _ = sousbatch("recipes", "show", "small.yaml", "model.config={z: 1, a: 2}")
    assert [line.split(":")[0] for line in out.splitlines() if line[0] != " "][:4] == [
        "name",
        "description",
        "task",
        "seed",
    ]
    assert out.index("    z: 1") < out.index("    a: 2")


def test_every_key_is_listed(sousbatch: Run) -> None:
    code, out, _ = sousbatch("recipes", "show", "--keys")
    assert code == 0 and re.search(r"^train\.steps +whole number >= 1, or null +steps in all", out, re.MULTILINE)


def test_the_library_is_listed(sousbatch: Run) -> None:
    code, out, _ = sousbatch("recipes", "list", "--json")
    assert code == 0 and "hangul-restoration" in [recipe["name"] for recipe in json.loads(out)]


def _parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _parsers(inner, (*words, name))


COMMANDS = dict(_parsers(build_parser()))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_works_and_has_an_example(sousbatch: Run, words: tuple[str, ...]) -> None:
    code, out, err = sousbatch(*words, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"^  sousbatch {' '.join(words)}", out, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_argument_has_help(words: tuple[str, ...]) -> None:
    assert [
        action.dest for action in COMMANDS[words]._actions if not action.help and action.dest not in ("command", "verb")
    ] == []


def _printed() -> list[str]:
    """Return the command lines that help prints; what follows two blanks explains them."""
    lines = (line for parser in COMMANDS.values() for line in parser.format_help().splitlines())
    found = (re.fullmatch(r"  (sousbatch .*?)(  .*)?", line) for line in lines)
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("line", _printed())
def test_a_printed_command_parses(line: str) -> None:
    build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("arguments", [["plan", "none"], ["status", "none"], ["plam"]])
def test_the_exit_code_reaches_the_shell_without_a_traceback(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "sousbatch", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_file_is_no_error(tmp_path: Path, closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m sousbatch status {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
def test_output_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    for words in ("status", "recipes show --keys"):
        command = f"{shlex.quote(sys.executable)} -m sousbatch {words} >/dev/full"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "sousbatch: a file: No space left on device\n")


@pytest.fixture
def toy_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds the command `greet`, another that cannot be loaded, and one that is ours."""
    (tmp_path / "toy.py").write_text(
        "from sousbatch.cli.parser import define\n"
        "def define_greet(parser):\n"
        "    define(parser, greet, 'greet you')\n"
        "    parser.add_argument('name', help='who')\n"
        "def greet(arguments):\n"
        "    print('hello', arguments.name)\n"
        "    return 1\n"
    )
    (tmp_path / "toy-1.0.dist-info").mkdir()
    (tmp_path / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (tmp_path / "toy-1.0.dist-info" / "entry_points.txt").write_text(
        "[sousbatch.commands]\ngreet = toy:define_greet\nstatus = toy:define_greet\nbroken = not_there:define\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("toy_package")
def test_a_package_adds_a_command_and_replaces_none(sousbatch: Run) -> None:
    assert sousbatch("greet", "you") == (1, "hello you\n", "")
    assert sousbatch("status")[1].startswith("no runs yet")
    assert re.search(r"^    greet +a third-party command$", sousbatch("--help")[1], re.MULTILINE)
    assert "command 'broken' cannot be imported from not_there:define" in _said(sousbatch, "broken")
    assert "known: recipes, plan" in (said := _said(sousbatch, "gret")) and "did you mean 'greet'?" in said


@pytest.mark.parametrize(("words", "own"), [(["--help"], set()), (["cancel", "--help"], {"runs", "tables"})])
def test_a_command_imports_its_own_module_only(words: list[str], own: set[str]) -> None:
    text = (
        "import sys\nfrom sousbatch.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n"
        "    print(*(name[14:] for name in sys.modules if name.startswith('sousbatch.cli.')), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True)
    assert set(done.stderr.split()) == own | {"main", "parser"}


@pytest.mark.parametrize(("command", "code"), [("submit", 141), ("resume", 141), ("status", 0)])
def test_a_reader_that_goes_away_is_told_by_the_exit_code_where_a_run_goes_on(command: str, code: int) -> None:
    text = (
        "import sys\nfrom sousbatch.cli import main, status, submit\n"
        "def run(_):\n    while True:\n        print('a line', flush=True)\n"
        "submit._submit = submit._resume = status._status = run\nsys.exit(main.main())\n"
    )
    words = [command, "x"] if command != "status" else [command]
    line = f"{shlex.join([sys.executable, '-c', text, *words])} 2>&1 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "a line\n", "")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m sousbatch recipes show --keys | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_is_there_already_says_which_resources_it_keeps(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first: list[Plan] = []

    def submit(plan: Plan, launcher: Any, runs: Path, *, again: bool) -> submission.Submitted:
        first.append(plan)
        paths = RunPaths(root=runs / "small" / plan.run_id)
        return submission.Submitted(plan=first[0], paths=paths, found={}, sent=(), is_new=len(first) == 1)

    monkeypatch.setattr(submission, "submit", submit)
    assert main(["submit", "small.yaml", "--detach"]) == 0
    assert "keeps" not in capsys.readouterr().err
    assert main(["submit", "small.yaml", "resources.predict.tasks=3", "--detach"]) == 0
    assert (
        "keeps no resources.predict.tasks, as it was submitted; --again makes another run with 3"
        in capsys.readouterr().err
    )
