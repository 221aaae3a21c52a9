"""Names inside a run folder."""

from __future__ import annotations

from pathlib import Path

from sousbatch.run_folder import RunPaths


def test_every_name_lies_in_the_run_folder_and_numbers_are_padded() -> None:
    paths = RunPaths(root=Path("/runs/toy/0123456789ab"))
    assert (paths.recipe_name, paths.run_id) == ("toy", "0123456789ab")
    assert paths.log("predict", 7) == paths.root / "logs" / "predict-00007.log"
    assert paths.log("predict", "%5a").name == "predict-%5a.log"
    assert paths.runs_dir == Path("/runs")
    assert paths.stop_flag("train", 0) == paths.root / "stop" / "train-00000"
    assert paths.code("../../elsewhere/src/") == paths.root / "code" / "src"
    properties = [name for name, value in vars(RunPaths).items() if isinstance(value, property)]
    inside = [getattr(paths, name) for name in properties if name not in ("run_id", "recipe_name", "runs_dir")]
    assert all(path.is_relative_to(paths.root) for path in inside)
    assert len(set(inside)) == len(inside)
