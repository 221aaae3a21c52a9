"""Names are found in our table first, then among the entry points of installed packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from sousbatch.errors import UsageError
from sousbatch.plugins import Registry

TOYS: Registry[object] = Registry("toy", "sousbatch.toys", {"ours": "errors:UsageError"})
Install = Callable[[str, str, str], None]


def test_ours_is_imported_from_its_module() -> None:
    assert TOYS.load("ours") is UsageError and TOYS.problem("ours") == ("", "")


def test_an_installed_package_adds_a_name(third_party: Install) -> None:
    third_party("sousbatch.toys", "theirs = toy_module:THEIRS", "THEIRS = 5")
    assert list(TOYS) == ["ours", "theirs"]
    assert (TOYS.load("theirs"), TOYS.problem("theirs")) == (5, ("", ""))


def test_an_installed_package_does_not_replace_ours(third_party: Install) -> None:
    third_party("sousbatch.toys", "ours = toy_module:THEIRS", "THEIRS = 5")
    assert list(TOYS) == ["ours"] and TOYS.load("ours") is UsageError


@pytest.mark.parametrize("source", ["", "raise RuntimeError('no GPU')"])
def test_what_cannot_be_imported_is_named(third_party: Install, source: str) -> None:
    third_party("sousbatch.toys", "theirs = toy_module:THEIRS", source)
    with pytest.raises(UsageError, match="toy 'theirs' cannot be imported from toy_module:THEIRS: "):
        TOYS.load("theirs")


def test_what_is_of_another_type_is_named(third_party: Install) -> None:
    third_party("sousbatch.toys", "theirs = toy_module:THEIRS", "THEIRS = 5")
    toys: Registry[str] = Registry("toy", "sousbatch.toys", {}, of=str)
    with pytest.raises(UsageError, match="toy 'theirs' is not a str: toy_module:THEIRS is 5"):
        toys.load("theirs")


def test_an_unknown_name_is_answered_with_the_known_ones(third_party: Install) -> None:
    third_party("sousbatch.toys", "theirs = toy_module:THEIRS", "")
    with pytest.raises(UsageError, match=r"toy 'our' is unknown; known: ours, theirs \(did you mean 'ours'\?\)"):
        TOYS.load("our")
    assert TOYS.problem("our") == ("is 'our'; known: ours, theirs", "did you mean 'ours'?")


@pytest.mark.parametrize(
    "names, found", [(["a", "theirs", "ours"], "ours"), (["a", "theirs"], "theirs"), (["a"], None)]
)
def test_of_several_names_the_first_known_one_is_found_ours_first(
    third_party: Install, names: list[str], found: str | None
) -> None:
    third_party("sousbatch.toys", "theirs = toy_module:THEIRS", "")
    assert TOYS.first_known(names) == found


def test_where_no_package_adds_a_name_looking_is_cheap() -> None:
    code = (
        "import sys\n"
        "from sousbatch.plugins import Registry\n"
        "print(list(Registry('toy', 'sousbatch.toys', {'ours': ''})), 'importlib.metadata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['ours'] False\n", "")
