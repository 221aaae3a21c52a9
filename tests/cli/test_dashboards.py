"""`sousbatch dashboards`, as a user types it; what a server has is in tests/tracking/test_wandb_views.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.files import make_private_dir
from sousbatch.launchers.freeze import freeze
from sousbatch.launchers.registry import choose_site, launcher_of
from sousbatch.recipes.sweep import plan_sweep
from sousbatch.run_folder import RunPaths, run_paths
from sousbatch.run_index import remember_run

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_recipe_is_shown_with_its_overrides_and_the_link(sousbatch: Run, project: Path, no_key: None) -> None:
    code, out, err = sousbatch("dashboards", "show", "small.yaml", "tracking.entity=team", "tracking.project=ours")
    lines = out.splitlines()
    assert (code, err, lines[0]) == (0, "", "small")
    assert '  lines "loss" train/loss, train/eval_loss over train/step' in lines
    assert lines[-1].startswith("`dashboards push` saves it as https://forge.coreweave.com/wandb/team/ours?nw=")


def test_a_sweep_is_shown_by_its_id_as_json(sousbatch: Run, project: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    plan = plan_sweep("small.yaml", [], ["train.learning_rate=0.1,0.2", "seed=1,2"], choose_site("local"), runs)
    sweep = run_paths(runs, plan.recipe.name, plan.run_id)
    make_private_dir(sweep.root.parent)
    make_private_dir(sweep.root)
    freeze(plan, launcher_of(plan), sweep)
    remember_run(sweep)
    code, out, _ = sousbatch("dashboards", "show", plan.run_id, "--json")
    found = json.loads(out)
    assert code == 0 and found["wanted"] == f"small-{plan.run_id}"
    assert found["sections"][-1]["panels"][0]["values"][:2] == ["config:train.learning_rate", "config:seed"]
    code, _, err = sousbatch("dashboards", "show", plan.run_id, "seed=3")
    assert code == 2 and "give overrides to a recipe" in err


def test_the_saved_dashboard_of_a_recipe_is_named_by_the_status_of_its_runs(
    sousbatch: Run, frozen: Callable[..., RunPaths], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))  # the one of all tests would name it in each
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("sousbatch.tracking.wandb_views.push", lambda server, dashboard: f"https://w/{dashboard.name}")
    run = frozen()
    assert "https://w" not in sousbatch("status", run.run_id)[1]
    assert sousbatch("dashboards", "push", "small.yaml", "tracking.entity=team")[:2] == (0, "https://w/small\n")
    assert "\ndashboard  https://w/small\n" in sousbatch("status", run.run_id)[1]
    (found,) = json.loads(sousbatch("status", run.run_id, "--json")[1])
    assert found["places"] == [{"what": "dashboard", "link": "https://w/small", "note": ""}]


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "no key": (["push", "small.yaml"], "there is no key for api.wandb.ai"),
        "no key to compare": (["diff", "small.yaml"], "`wandb login` writes it"),
        "disabled": (["push", "small.yaml", "tracking.mode=disabled"], "set tracking.mode=auto"),
        "elsewhere": (["show", "small.yaml", "tracking.trackers=[tensorboard]"], "tracking.trackers has no wandb"),
        "unknown": (["show", "smal"], "a run or sweep of that name does not exist either"),
    }.values(),
)
def test_what_cannot_be_done_is_one_line(
    sousbatch: Run, project: Path, no_key: None, words: list[str], said: str
) -> None:
    code, out, err = sousbatch("dashboards", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
