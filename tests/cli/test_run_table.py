"""`sousbatch runs`: which of my runs was best, why, and where is its model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.events import Ended, ModelWritten, Saved, Started, Step
from sousbatch.files import make_private_dir, remove_tree, write_json
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import remember_run

Run = Callable[..., tuple[int, str, str]]
Make = Callable[..., RunPaths]
DONE = ("train", "consolidate", "predict", "merge", "score")


@pytest.fixture
def make(sousbatch: Run, project: Path, tmp_path: Path) -> Make:
    """Return what makes a run that has ended, or stopped after some of its stages."""
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    plain: dict[str, Any] = json.loads(out)

    def made(
        run_id: str, *, changes: dict[str, Any], scores: dict[str, dict[str, float]], done: tuple[str, ...] = DONE
    ) -> RunPaths:
        paths, plan = RunPaths(root=tmp_path / "runs" / "small" / run_id), json.loads(json.dumps(plain))
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (plan["recipe"][section] if section else plan["recipe"])[name] = value
        make_private_dir(paths.root.parent)
        make_private_dir(paths.root)
        write_json(paths.plan, plan)
        remember_run(paths)
        for stage in done:
            attempt = ledger.open_attempt(paths.ledger_dir, stage, 0)
            attempt.write(Started(host="here"))
            job = ledger.open_job(paths.ledger_dir, stage, 0, attempt.number)
            if stage == "train":
                for step in (1, 2, 3):
                    speed = {"throughput/examples_per_s": 8.0, "throughput/tokens_per_s": 100.0 * step}
                    job.write(Step(step=step, values={"loss": 1 / step} | speed))
                job.write(Saved(step=3, metric=0.25, held_bytes=3000))
                paths.checkpoints(stage).mkdir(parents=True)
            if stage == "consolidate":
                job.write(ModelWritten(num_bytes=500))
                paths.model(stage).mkdir(parents=True)
            job.close()
            attempt.write(Ended(exit_code=0))
            attempt.close()
        if scores:
            found = {name: {"split": "test", "num_rows": 5, "scores": {"model": one}} for name, one in scores.items()}
            write_json(paths.metrics, found)
        return paths

    return made


def test_runs_show_what_differs_and_the_best_first(sousbatch: Run, make: Make) -> None:
    make("aaa", changes={"train.learning_rate": 0.1}, scores={"score": {"cer": 0.5, "exact_match": 0.1}})
    make("bbb", changes={"train.learning_rate": 0.2}, scores={"score": {"cer": 0.2, "exact_match": 0.4}})
    make("ccc", changes={"train.learning_rate": 0.3}, scores={}, done=("train",))
    _, out, _ = sousbatch("runs", "--sort", "cer")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["run", "state", "sent", "train.learning_rate", "steps"]
    assert [line[0] for line in lines[1:]] == ["bbb", "aaa", "ccc"]  # of cer less is better; no score comes last
    assert lines[1][4:10] == ["0.2", "3/6", "0.3333", "0.25", "8", "200"]
    assert lines[1][-2:] == ["3.5", "kB"]
    _, out, _ = sousbatch("runs", "--sort", "exact_match")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["bbb", "aaa", "ccc"]


def test_the_best_run_is_told_with_what_sets_it_apart_and_its_model(sousbatch: Run, make: Make) -> None:
    make("aaa", changes={"seed": 1}, scores={"score": {"cer": 0.5}})
    best = make("bbb", changes={"seed": 2}, scores={"score": {"cer": 0.2}})
    _, out, _ = sousbatch("runs", "small", "--best", "cer")
    assert out.splitlines() == [
        "run     bbb",
        "cer     0.2",
        "next    0.5 of aaa, among 2 with this score",
        "seed    2  (next: 1)",
        f"folder  {best.root}",
        f"model   {best.model('consolidate')}",
        "",
        "predict with it again: model.path=run:bbb",
        "all that differs: sousbatch runs --diff bbb aaa",
    ]
    remove_tree(best.model_dir)
    assert "model   was removed\n" in sousbatch("runs", "small", "--best", "cer")[1]
    told = json.loads(sousbatch("runs", "small", "--best", "cer", "--json")[1])
    assert [row["run"] for row in told] == ["bbb"]


def test_a_score_without_its_stage_is_that_of_the_first(sousbatch: Run, make: Make) -> None:
    make("aaa", changes={"seed": 1}, scores={"score": {"cer": 0.5}, "score-other": {"cer": 0.1}})
    make("bbb", changes={"seed": 2}, scores={"score": {"cer": 0.2}, "score-other": {"cer": 0.9}})
    assert sousbatch("runs", "--best", "cer")[1].split()[:4] == ["run", "bbb", "cer", "0.2"]
    assert sousbatch("runs", "--best", "score-other/cer")[1].split()[:4] == ["run", "aaa", "score-other/cer", "0.1"]


def test_seeds_of_one_recipe_stand_together(sousbatch: Run, make: Make) -> None:
    for seed, value in ((1, 0.1), (2, 0.3)):
        make(f"a{seed}", changes={"seed": seed}, scores={"score": {"cer": value}})
    make("b", changes={"seed": 1, "train.learning_rate": 0.5}, scores={"score": {"cer": 0.9}})
    _, out, _ = sousbatch("runs", "--seeds")
    assert "0.2000 ± 0.1414" in out
    assert len(out.splitlines()) == 3


def test_each_decoding_has_a_row(sousbatch: Run, make: Make) -> None:
    decodings = {"greedy": {}, "beams": {"num_beams": 4}}
    scores = {"score@greedy": {"cer": 0.4}, "score@beams": {"cer": 0.3}}
    make("aaa", changes={"predict.decodings": decodings}, scores=scores)
    _, out, _ = sousbatch("runs", "--json")
    rows = {row["decoding"]: (row["recipe_values"]["predict.num_beams"], row["scores"]) for row in json.loads(out)}
    assert rows == {"greedy": (None, {"cer": 0.4}), "beams": (4, {"cer": 0.3})}


def test_two_runs_stand_side_by_side_with_what_went_in_and_what_came_out(sousbatch: Run, make: Make) -> None:
    first = make("aaa", changes={"train.learning_rate": 0.1}, scores={"score": {"cer": 0.5}})
    second = make("bbb", changes={"train.learning_rate": 0.2}, scores={"score": {"cer": 0.25}}, done=("train",))
    for paths, version in ((first, "2.11"), (second, "2.13")):
        plan = json.loads(paths.plan.read_text())
        plan["inputs"]["versions"]["torch"] = version
        write_json(paths.plan, plan)
    _, out, _ = sousbatch("runs", "--diff", "aaa", "bbb")
    went_in, came_out = (part.splitlines() for part in out.split("\n\n"))
    assert [line.split() for line in went_in] == [
        ["went", "in", "aaa", "bbb"],
        ["train.learning_rate", "0.1", "0.2"],
        ["torch", "2.11", "2.13"],
    ]
    assert came_out[1].split()[:2] == ["state", "done"]
    assert came_out[-1].split() == ["cer", "0.5", "0.25", "-0.25"]
    told = json.loads(sousbatch("runs", "--diff", "aaa", "bbb", "--json")[1])
    assert told["runs"] == ["aaa", "bbb"]
    assert told["inputs"][0] == {"key": "train.learning_rate", "first": 0.1, "second": 0.2}
    assert told["results"][-1] == {"key": "cer", "first": 0.5, "second": 0.25}


def test_runs_are_chosen_by_values_and_written_as_csv(sousbatch: Run, make: Make) -> None:
    make("aaa", changes={"seed": 1}, scores={"score": {"cer": 0.5}})
    make("bbb", changes={"seed": 2}, scores={})
    _, out, _ = sousbatch("runs", "--where", "seed=1", "--csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["run"], row["scores.cer"], row["seed"], row["state"]) == ("aaa", "0.5", "1", "done")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--where", "sed=1"], "--where sed: no recipe of these runs has that key (did you mean 'seed'?)"),
        (["--where", "sed"], "argument --where: must be KEY=VALUE, not 'sed'"),
        (["--sort", "cerr"], "'cerr' is no column of these runs (did you mean 'cer'?)"),
        (["--sort", "xyzxyz"], "steps, loss, best, examples/s, tokens/s, cer, device hours, holds)"),
        (["--best", "chrf"], "'chrf' is no column of these runs"),
        (["nobody"], "run 'nobody' does not exist"),
        (["--diff", "aaa", "nobody"], "run 'nobody' does not exist"),
        (["--diff", "aaa", "aaa", "--csv"], "runs --diff takes two runs, and --json"),
    ],
)
def test_what_runs_do_not_have_is_refused_with_what_they_have(
    sousbatch: Run, make: Make, words: list[str], says: str
) -> None:
    make("aaa", changes={}, scores={"score": {"cer": 0.5}})
    code, _, err = sousbatch("runs", *words)
    assert code != 0
    assert says in err


def test_a_damaged_run_hides_no_other(sousbatch: Run, make: Make) -> None:
    make("aaa", changes={}, scores={"score": {"cer": 0.5}})
    make("bbb", changes={}, scores={}).plan.write_text("{")
    _, out, _ = sousbatch("runs")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["aaa", "done"], ["bbb", "unknown"]]


def test_damaged_scores_and_a_cache_that_cannot_be_written_hide_nothing_else(
    sousbatch: Run, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("aaa", changes={}, scores={"score": {"cer": 0.5}}).metrics.write_text('{"score": {"sco')
    make("bbb", changes={}, scores={}).metrics.write_text('{"score": 5}')
    (tmp_path / "a file").touch()
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "a file"))
    code, out, _ = sousbatch("runs")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["aaa", "done"], ["bbb", "done"]]


def test_a_price_makes_costs(sousbatch: Run, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("aaa", changes={}, scores={})
    monkeypatch.setenv("SOUSBATCH_CONFIG", str(tmp_path / "config.yaml"))
    (tmp_path / "config.yaml").write_text("device_hour_price: 2.5\n")
    assert "cost" in sousbatch("runs")[1]
    (tmp_path / "config.yaml").write_text("device_hour_price: cheap\n")
    assert "device_hour_price is 'cheap'; write a number above 0, such as 1.9" in sousbatch("runs")[2]


@pytest.mark.parametrize(
    ("codes", "state"),
    [((), "waiting"), ((75,), "stopped"), ((75, None), "running"), ((3,), "failed"), ((3, 75), "stopped")],
)
def test_a_point_is_told_by_its_newest_attempt(
    sousbatch: Run, make: Make, codes: tuple[int | None, ...], state: str
) -> None:
    sweep = make("sweep-1", changes={}, scores={}, done=())
    point = RunPaths(root=sweep.root / "small" / "abc")
    make_private_dir(point.root.parent)
    make_private_dir(point.root)
    write_json(point.plan, json.loads(sweep.plan.read_text()))
    for code in codes:
        attempt = ledger.open_attempt(point.ledger_dir, "train", 0)
        attempt.write(Started(host="here"))
        if code is not None:
            attempt.write(Ended(exit_code=code))
        attempt.close()
    assert sousbatch("runs")[1].splitlines()[1].split()[:2] == ["abc", state]
