"""How a rank gets into its container: options for srun (pyxis), or a command before it (apptainer). Pure."""

from __future__ import annotations

from pathlib import Path

from ...recipes.plan import Plan
from ...run_folder import RunPaths


def around(plan: Plan, paths: RunPaths) -> tuple[list[str], list[str]]:
    """Return srun's options and the words before the rank's command; both empty without a container.

    The container sees what a job reads and writes, at the same paths: the run folder, the model and the data.
    """
    wanted = plan.recipe.environment
    if wanted.container is None:
        return [], []
    folders = {str(paths.root), plan.inputs.model.folder, plan.inputs.model.tokenizer_folder}
    folders |= {str(Path(split.path).parent) for split in plan.inputs.splits.values()}
    mounts = [*sorted(f"{folder}:{folder}" for folder in folders), *wanted.mounts]
    if wanted.container_runtime == "pyxis":
        return [f"--container-image={wanted.container}", f"--container-mounts={','.join(mounts)}"], []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", "--nv", *binds, wanted.container]
