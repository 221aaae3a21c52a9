"""What counts as a full store, and near words."""

from __future__ import annotations

import errno

import pytest

from sousbatch.errors import DamagedError, NoRoomError, is_no_room, nearest, no_room_named


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError(errno.EIO, "broken"), False),
        (NoRoomError("full"), True),
        (DamagedError("cut off"), False),
        (chained(RuntimeError("unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "full")), True),
        (chained(RuntimeError("unexpected pos 64 vs 0"), OSError(errno.EIO, "broken")), False),
    ],
)
def test_a_full_disk_is_seen_however_it_is_wrapped(error: BaseException, expected: bool) -> None:
    assert is_no_room(error) is expected


def test_a_full_disk_names_what_was_being_written() -> None:
    with pytest.raises(NoRoomError, match="no space left while writing the plan: full"), no_room_named("the plan"):
        raise OSError(errno.ENOSPC, "full")
    again = "while writing out.jsonl: full; free some space and merge again"
    with pytest.raises(NoRoomError, match=again), no_room_named("out.jsonl", "merge again"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(PermissionError), no_room_named("the plan"):
        raise PermissionError(errno.EACCES, "no")


def test_only_a_near_word_is_offered() -> None:
    assert nearest("tiny7", ["tiny", "base"]) == "did you mean 'tiny'?"
    assert nearest("zebra", ["tiny", "base"]) == ""
