"""Guards of the layout: folders at the root are the sub-packages, and imports follow one line."""

from __future__ import annotations

import ast
import configparser
import graphlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"tests", "benchmarks", "build", "dist"}
HEAVY = ("torch", "transformers", "deepspeed", "peft", "wandb", "accelerate", "datasets", "numpy")

# Left never imports right, and jobs and launchers never see each other.
LINE: tuple[set[str], ...] = (
    {
        *{"redaction", "errors", "files", "run_folder", "run_index", "user_folders", "remote"},
        *{"events", "ledger", "ledger_queries", "job_environment", "plugins", "__init__"},
    },
    {"checkpoints"},
    {"predictions"},
    {"cluster", "tracking", "publishing"},
    {"recipes"},
    {"jobs", "launchers"},
    {"api"},
    {"cli", "__main__"},
)


def _sources() -> list[Path]:
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in found if path.parts[0] not in OUTSIDE and not path.parts[0].startswith("."))


def _imports(source: Path) -> Iterator[str]:
    """Yield what *source* imports: the dotted module below sousbatch, or an absolute name."""
    package = ("sousbatch", *source.parent.parts)
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1])
            yield from [f"{base}.{node.module}"] if node.module else [f"{base}.{alias.name}" for alias in node.names]


def _part(module: str) -> str:
    parts = module.split(".")
    return "__init__" if len(parts) == 1 or parts[1] == "__version__" else parts[1]


def _place(part: str) -> int:
    return next(number for number, parts in enumerate(LINE) if part in parts)


def test_every_package_folder_is_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {source.parent for source in _sources() if source.name == "__init__.py"}
    assert listed == {".".join(("sousbatch", *folder.parts)) for folder in folders}


def test_every_folder_of_sources_is_a_package() -> None:
    assert [str(source) for source in _sources() if not (ROOT / source.parent / "__init__.py").is_file()] == []


def test_no_module_imports_the_package_by_its_name() -> None:
    absolute = [
        str(source)
        for source in _sources()
        for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "sousbatch")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "sousbatch" for alias in node.names))
    ]
    assert absolute == []


def test_imports_follow_the_one_line() -> None:
    wrong = []
    for source in _sources():
        own = source.parts[0].removesuffix(".py")
        if own == "__init__":  # the public face imports nothing before a name is used: tests/test_api.py
            continue
        for module in _imports(source):
            other = _part(module) if module.split(".")[0] == "sousbatch" else own
            is_beside = other != own and _place(other) == _place(own) and _place(own) not in (0, len(LINE) - 1)
            if _place(other) > _place(own) or is_beside:
                wrong.append(f"{source} imports {module}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {
        ".".join(("sousbatch", *source.with_suffix("").parts)).removesuffix(".__init__"): source
        for source in _sources()
    }
    graph: dict[str, set[str]] = {}
    for name, source in names.items():
        package = ("sousbatch", *source.parent.parts)
        for node in ast.walk(_at_run_time(ast.parse((ROOT / source).read_text(encoding="utf-8")))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
                found = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base for alias in node.names}
                graph.setdefault(name, set()).update(found - {name})
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that lists the circle


def _at_run_time(tree: ast.Module) -> ast.Module:
    """Leave out what only a type checker imports."""
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    return tree


def test_checkpoints_never_import_torch_distributed() -> None:
    sources = [source for source in _sources() if source.parts[0] == "checkpoints"]
    wrong = [f"{source} imports {name}" for source in sources for name in _imports(source) if "distributed" in name]
    assert wrong == []


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "list"]])
def test_packages_of_the_user_do_not_shadow_ours(tmp_path: Path, arguments: list[str]) -> None:
    for name in ("jobs", "recipes", "launchers", "checkpoints", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the folder of the user was imported')")
    for name in ("errors", "files", "show", "cli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the module of the user was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "sousbatch.cli.main", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["plan", "small.yaml"],
        ["plan", "small.yaml", "--script"],
        ["dashboards", "show", "small.yaml", "tracking.entity=team"],
    ],
)
def test_planning_imports_nothing_heavy(project: Path, command: list[str]) -> None:
    code = (
        "import sys\n"
        "from sousbatch.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], code, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.stderr == "[] 0\n"


def test_the_first_line_of_each_docstring_is_short() -> None:
    long = []
    for source in _sources():
        for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(first) >= 80:
                    long.append(f"{source}:{getattr(node, 'lineno', 1)} {first}")
    assert long == []


def test_the_wheel_holds_all_that_is_read_at_run_time(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--wheel-dir", tmp_path, clone], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"sousbatch/{path.relative_to(clone)}"
        for pattern in ("py.typed", "*.py", "*/*.py", "*/*/*.py", "recipes/library/**/*.*", "cli/report/page.*")
        for path in clone.glob(pattern)
        if path.relative_to(clone).parts[0] not in OUTSIDE
    }
    assert wanted - held == set()
    assert [name for name in held if name.split("/")[1] in OUTSIDE] == []
