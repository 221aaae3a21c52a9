"""How a rank gets into its container: options for srun (pyxis), or a command before it (apptainer). Pure."""

from __future__ import annotations

from pathlib import Path

from ...recipes.plan import Stage
from ...recipes.schema import Environment
from ...run_folder import RunPaths


def around(wanted: Environment, stage: Stage, paths: RunPaths) -> tuple[list[str], list[str]]:
    """Return srun's options and the words before the rank's command; both empty without a container.

    The container sees what a job reads and writes, at the same paths: the run folder, the model and the data.
    """
    if wanted.container is None:
        return [], []
    folders = {str(paths.root), stage.model.folder, stage.model.tokenizer_folder}
    folders |= {str(Path(split.path).parent) for split in stage.splits.values()}
    mounts = [*sorted(f"{folder}:{folder}" for folder in folders), *wanted.mounts]
    if wanted.container_runtime == "pyxis":
        return [f"--container-image={wanted.container}", f"--container-mounts={','.join(mounts)}"], []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", "--nv", *binds, wanted.container]
