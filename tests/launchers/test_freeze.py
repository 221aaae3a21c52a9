"""What is written at submission, and read by every job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sousbatch.launchers.freeze import freeze
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.recipes.plan import Plan, Stage
from sousbatch.recipes.schema import Resources, Tracking
from sousbatch.run_folder import RunPaths
from sousbatch.tracking.identity import RunIdentity, read_identity

MERGE = Stage(name="merge", kind="merge", of=None, resources=Resources(device="cpu"), num_tasks=1, after=())


def test_the_identity_of_tracked_runs_is_fixed(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan([MERGE], tracking=Tracking(project="ours", tags=("a",), entity="team"))
    paths = RunPaths(root=tmp_path / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), paths)
    assert read_identity(paths.tracking_dir) == RunIdentity(
        recipe="toy",
        run=plan.run_id,
        group=plan.run_id,
        mode="offline",
        trackers=("wandb",),
        project="ours",
        entity="team",
        tags=("a",),
    )


def test_the_points_of_a_sweep_are_one_group(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan([MERGE])
    sweep = RunPaths(root=tmp_path / "toy" / "sweep-0123456789ab")
    point = RunPaths(root=sweep.root / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), point, within=sweep, point=0)
    found = read_identity(point.tracking_dir)
    assert (found.run, found.group) == (plan.run_id, "sweep-0123456789ab")
