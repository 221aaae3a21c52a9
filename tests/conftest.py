"""What all tests share: no test touches the user's own state, cache or runs.

`project` is a small project of a user: a model whose weights are written by hand, so that planning
reads headers and needs no torch, three data files, and a recipe for the CPU.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cli.main import main
from sousbatch.cluster.sandbox import build, lifecycle
from sousbatch.launchers.freeze import freeze
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths

os.environ["WANDB_MODE"] = "offline"  # no test shows a run at the account of the one who runs it


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share checkpoints of real DeepSpeed runs on one worker, and mark those that need a Slurm."""
    for item in items:
        if (
            "/checkpoints/formats/" in item.path.as_posix() or "/checkpoints/consolidation/" in item.path.as_posix()
        ):  # they are made once a worker
            item.add_marker(pytest.mark.xdist_group("zero"))
        if {"slurm", "slurm_accounting"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slurm)
    items[:] = _in_turn(items)


def _in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Put trainings between tests of launchers: these wait for Slurm while those of the other worker use the cores.

    Without it both workers would train at once, and later both would wait at once.
    """
    trainings: dict[str, list[pytest.Item]] = {}
    waiting, others = [], []
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if "/end_to_end/" in item.path.as_posix():
            trainings.setdefault(group.args[0] if group else item.nodeid, []).append(item)
        elif "/launchers/" in item.path.as_posix():
            waiting.append(item)
        else:
            others.append(item)
    mixed = []
    for number, training in enumerate(trainings.values()):
        mixed += training + waiting[number :: len(trainings)]
    return (mixed or waiting) + others


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache per worker: a look at a model's shapes costs seconds, so it is taken once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUSBATCH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("SOUSBATCH_CACHE", str(cache_dir))
    monkeypatch.setenv("SOUSBATCH_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SOUSBATCH_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.delenv("SOUSBATCH_RECIPES", raising=False)
    no_slurm = cache_dir / "no-slurm.conf"  # a machine with a Slurm of its own gets no jobs from tests
    no_slurm.touch()
    monkeypatch.setenv("SLURM_CONF", str(no_slurm))


_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 512,
}
# Every word is one token, the same for all; the end token is known.
_SPECIALS = [
    {"id": number, "content": text, "special": True}
    | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, text in enumerate(("<unk>", "<s>", "</s>"))
]
_TOKENIZER = {
    "version": "1.0",
    "added_tokens": _SPECIALS,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}, "unk_token": "word"},
} | dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
_TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
_RECIPE = """\
name: small
description: a recipe of the tests
model: {path: MODEL}
data:
  splits: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}
  max_tokens: 32
train: {epochs: 2, global_batch: 4, precision: float32}
resources:
  default: {device: cpu}
"""


@pytest.fixture(autouse=True)
def _models_built_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the models of plans in this process: one of its own imports torch for seconds, for each model anew.

    Tests of that process itself are in test_architecture.py; what runs the command line as a process has it, too.
    """
    if request.path.name != "test_architecture.py":
        monkeypatch.setattr("sousbatch.recipes.inspect.model._run_architecture", _built_here)


def _built_here(question: Mapping[str, Any]) -> Any:
    from transformers.utils import logging

    from sousbatch.errors import UsageError
    from sousbatch.files import canonical_json
    from sousbatch.recipes.inspect import architecture

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that process is told so, too
            return json.loads(json.dumps(architecture.answer(json.loads(canonical_json(question)))))
    except Exception as error:
        said = str(error) if isinstance(error, UsageError) else traceback.format_exception_only(error)[-1]
        reason = said.strip().splitlines()[-1]
        raise UsageError(f"model.path {question['folder']!r} cannot be trained here: {reason}") from error
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's folder, which is also the working directory."""
    folder = tmp_path / "my 'project'"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "model" / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))
    _write_weights(folder / "model" / "model.safetensors")
    for split, num_rows in (("train", 10), ("validation", 3), ("test", 5)):
        rows = [{"input": f"{split} {number}", "target": f"답 {number}"} for number in range(num_rows)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    (folder / "small.yaml").write_text(_RECIPE.replace("MODEL", json.dumps(str(folder / "model"))))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stand_in_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Install a stand-in for vLLM on a CPU; it dies at the request whose number is written into the returned file."""
    installed = tmp_path / "site" / "vllm-0.33.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0+cpu\n")
    for folder in (installed.parent, Path(__file__).parent / "toys/stand_in_vllm"):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("STAND_IN_VLLM_DIES_AT", str(tmp_path / "dies_at"))
    yield tmp_path / "dies_at"
    for name in [one for one in sys.modules if one.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Install the task `windows` of another package, as pip would."""
    installed = tmp_path / "site" / "windows-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: windows\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[sousbatch.tasks]\nwindows = windows_task:TASK\n")
    folders = (installed.parent, Path(__file__).parent / "toys")
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))  # planning builds the model in a process


def _write_weights(path: Path) -> None:
    hidden, inner, words = (_CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes = {
        "model.embed_tokens.weight": [words, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [words, hidden],
    }
    for layer in range(2):
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{name}_layernorm.weight"] = [hidden]
        for name in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = [hidden, hidden]
        for name in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = [inner, hidden]
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = [hidden, inner]
    header, place = {}, 0
    for name, shape in shapes.items():
        num_bytes = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + num_bytes]}
        place += num_bytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a real file system with options such as `size=64k`, and return its folder."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"small-{len(mounted)}"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode:
            pytest.skip("a small file system needs the right to mount one")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sousbatch(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process and return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse: --help and wrong usage
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def frozen(sousbatch: Run, project: Path, tmp_path: Path) -> Callable[..., RunPaths]:
    """Freeze the plan of the project's recipe with overrides, as a submission does that sends nothing."""

    def freeze_plan(*overrides: str) -> RunPaths:
        code, out, err = sousbatch("plan", "small.yaml", *overrides, "--json")
        assert (code, err) == (0, "")
        (tmp_path / "made.json").write_text(out)
        plan = read_plan(tmp_path / "made.json")
        paths = RunPaths(root=tmp_path / "runs/small" / plan.run_id)
        freeze(plan, LocalLauncher(), paths)
        return paths

    return freeze_plan


# The folder of a sandbox that another user has started, for `.ci/test-slurm-as`.
GIVEN = os.environ.get("SOUSBATCH_TEST_SANDBOX", "")

# Waits for the end of its stdin, which comes however the tests end, and leaves nothing behind.
_KEEPER = """
import sys
sys.stdin.read()
from pathlib import Path
from sousbatch.cluster.sandbox import lifecycle
lifecycle.stop(Path(sys.argv[1]))
Path(sys.argv[1]).parent.rmdir()
"""


@pytest.fixture(scope="session")
def slurm_settings() -> dict[str, str]:
    """Values of slurm.conf that every sandbox of the tests gets, such as `make test-slurm SET="JobRequeue=0"` names."""
    return dict(word.split("=", 1) for word in os.environ.get("SOUSBATCH_TEST_SET", "").split())


def _private_slurm(settings: dict[str, str], *, accounting: bool) -> Iterator[lifecycle.Sandbox]:
    if GIVEN:
        yield lifecycle.read(Path(GIVEN))
        return
    if missing := build.missing_packages(accounting=accounting):
        pytest.skip(f"Slurm is not here; `{build.install_command(missing)}` installs it")
    folder = Path(tempfile.mkdtemp(prefix="sb-")) / "slurm"  # short, for the sake of sockets
    command = [sys.executable, "-P", "-c", _KEEPER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield lifecycle.start(folder, accounting=accounting, settings=settings)


@pytest.fixture(scope="session")
def _slurm(slurm_settings: dict[str, str]) -> Iterator[lifecycle.Sandbox]:
    yield from _private_slurm(slurm_settings, accounting=False)


@pytest.fixture(scope="session")
def _slurm_accounting(slurm_settings: dict[str, str]) -> Iterator[lifecycle.Sandbox]:
    yield from _private_slurm(slurm_settings, accounting=True)


def _for_one_test(box: lifecycle.Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[lifecycle.Sandbox]:
    if "enable_configless" in box.settings.get("SlurmctldParameters", ""):
        monkeypatch.delenv("SLURM_CONF")
        monkeypatch.setenv("SLURM_CONF_SERVER", f"{box.address}:{box.ports[0]}")
    else:
        monkeypatch.setenv("SLURM_CONF", str(box.conf))
    yield box
    if not GIVEN:
        lifecycle.start(box.folder)  # a test may have killed a daemon
    subprocess.run(["scancel", f"--user={os.getuid()}"], check=True)
    deadline = time.monotonic() + 60
    while subprocess.run(["squeue", "--noheader"], capture_output=True, check=True).stdout:
        assert time.monotonic() < deadline, "jobs outlive their cancellation"
        time.sleep(0.1)


@pytest.fixture
def slurm(_slurm: lifecycle.Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[lifecycle.Sandbox]:
    """A private Slurm without accounting, shared by a worker's tests; jobs that a test leaves are cancelled."""
    yield from _for_one_test(_slurm, monkeypatch)


@pytest.fixture
def slurm_accounting(
    _slurm_accounting: lifecycle.Sandbox, monkeypatch: pytest.MonkeyPatch
) -> Iterator[lifecycle.Sandbox]:
    """The same with accounting."""
    yield from _for_one_test(_slurm_accounting, monkeypatch)


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Install a distribution that puts a name into an entry-point group: `third_party(group, entry, source)`."""
    folder = tmp_path / "site-packages"
    (folder / "toy-1.0.dist-info").mkdir(parents=True)
    (folder / "toy-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(folder)

    def install(group: str, entry: str, source: str) -> None:
        with (folder / "toy-1.0.dist-info/entry_points.txt").open("a") as stream:
            stream.write(f"[{group}]\n{entry}\n")
        (folder / "toy_module.py").write_text(source)
        monkeypatch.delitem(sys.modules, "toy_module", raising=False)

    return install
