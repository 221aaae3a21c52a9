"""Write the #SBATCH lines of a batch script, and container options. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ...cluster.site import Partition, Site
from ...recipes.plan import Stage
from ...recipes.schema import Environment, Resources
from ...run_folder import RunPaths
from ..base import notice_s

_GPU_OPTIONS = ("--gres", "--gpus", "-G")  # beginnings: --gpus-per-node and its kin, too
_ONE_LINE = ("partition", "account", "qos", "constraint", "exclude", "reservation")


def header(
    name: str,
    log: str,
    resources: Resources,
    site: Site,
    *,
    uses_devices: bool,
    ranks_per_node: int | None = None,
    array_size: int | None = None,
) -> tuple[str, ...]:
    """Return the #SBATCH lines of a job called *name*.

    *log* is the path of its log, from its working folder. A node has a rank for each device, unless *ranks_per_node*
    says otherwise.

    The recipe's own lines come last: Slurm takes the last of two that disagree.
    """
    lines = [
        *[f"--job-name={name}", f"--output={log}", "--open-mode=append"],
        *_size(resources, site, uses_devices=uses_devices, ranks_per_node=ranks_per_node),
        *_time(resources, site.partition(resources.partition)),
        *["--requeue", "--kill-on-invalid-dep=yes"],
    ]
    lines += [f"--{word}={value}" for word in _ONE_LINE if (value := getattr(resources, word)) is not None]
    if array_size is not None:
        at_once = f"%{resources.tasks_at_once}" if resources.tasks_at_once else ""
        lines.append(f"--array=0-{array_size - 1}{at_once}")
    return tuple(f"#SBATCH {line}" for line in (*lines, *resources.sbatch))


def array_size(num_tasks: int, num_stages: int, site: Site) -> int:
    """Return how many array elements share *num_tasks* tasks.

    Element i does tasks i, i + size, i + 2 size and so on.

    An index must lie below MaxArraySize, and each element counts as a job against a submit limit.
    """
    most = site.max_jobs - (num_stages - 1) if site.max_jobs is not None else num_tasks
    return max(1, min(num_tasks, site.max_array_size, most))


def _size(resources: Resources, site: Site, *, uses_devices: bool, ranks_per_node: int | None) -> Iterator[str]:
    nodes, devices = (resources.nodes, resources.devices_per_node) if uses_devices else (1, 1)
    tasks, cpus = ranks_per_node or devices, devices * resources.cpus_per_device
    yield f"--nodes={nodes}"
    yield f"--ntasks-per-node={tasks}"
    yield f"--cpus-per-task={cpus // tasks}"
    gpus = devices if uses_devices and resources.device == "gpu" else 0
    memory = _memory_mb(resources, site, cpus=cpus, gpus=gpus)
    if memory is not None:
        yield f"--mem={memory}M"
    # Slurm refuses --gpus-per-node beside --gres since 26.05; the recipe's own line says it all
    if gpus and not any(line.startswith(_GPU_OPTIONS) for line in resources.sbatch):
        yield f"--gres=gpu:{gpus}"


def _memory_mb(resources: Resources, site: Site, *, cpus: int, gpus: int) -> int | None:
    """Return MiB of host memory for each node.

    It is what is asked, else the site's default (None), else a fair share.

    Where a site has no default, a job that asks for nothing gets the whole node and keeps others from it.
    """
    if resources.memory_gb is not None:
        return math.ceil(resources.memory_gb * 1e9 / (1 << 20))
    partition = site.partition(resources.partition)
    if partition is None or partition.has_memory_default:
        return None
    kinds = [kind for kind in partition.nodes if kind.gpus >= gpus] or list(partition.nodes)
    shares = [kind.memory_mb * max(cpus / max(kind.cpus, 1), gpus / kind.gpus if kind.gpus else 0, 0) for kind in kinds]
    return max(1, int(min(min(shares), min(kind.memory_mb for kind in kinds))))


def _time(resources: Resources, partition: Partition | None) -> Iterator[str]:
    """Ask for the time limit, and for notice before it.

    The notice is a tenth of the limit, at least 60 s, at most half of it.

    The notice goes to the batch shell alone ("B:"): srun would hand it to ranks that cannot save on their own.
    """
    minutes = resources.time_min
    if minutes is not None:
        yield f"--time={minutes}"
    elif partition is not None:
        minutes = partition.default_minutes or partition.max_minutes
    if minutes is not None:
        yield f"--signal=B:USR1@{int(notice_s(minutes))}"


def container_words(environment: Environment, stage: Stage, paths: RunPaths) -> tuple[list[str], list[str]]:
    """Return srun's options (pyxis) and the words before a rank (apptainer).

    Both are empty without a container.

    The container sees what a job reads and writes, at the same paths: the run folder, the model and the data.
    """
    if environment.container is None:
        return [], []
    folders = {str(paths.root), stage.model.folder, stage.model.tokenizer_folder}
    folders |= {str(Path(split.path).parent) for split in stage.splits.values()}
    mounts = [*sorted(f"{folder}:{folder}" for folder in folders), *environment.mounts]
    if environment.container_runtime == "pyxis":
        return [f"--container-image={environment.container}", f"--container-mounts={','.join(mounts)}"], []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", "--nv", *binds, environment.container]
