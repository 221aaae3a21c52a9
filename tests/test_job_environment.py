"""What launcher and job say to each other: the same values come out, and none leaks into another job."""

from __future__ import annotations

import pytest

from sousbatch.cluster.environment import without_leaks
from sousbatch.job_environment import JobEnvironment

FULL = JobEnvironment(
    task=7, job="9_3", devices="", sweep="sweep-1", attempt=2, micro_batch=4, accumulation=8, stop_flag="/a b/stop"
)


@pytest.mark.parametrize("given", [JobEnvironment(), JobEnvironment(task=3, attempt=1), FULL])
def test_what_is_given_is_what_is_read(given: JobEnvironment) -> None:
    assert JobEnvironment.from_env({"HOME": "/home/a"} | given.to_env()) == given


def test_the_variables_are_those_that_scripts_and_documents_name() -> None:
    assert JobEnvironment(task=3, attempt=1).to_env() == {"SOUSBATCH_TASK": "3", "SOUSBATCH_ATTEMPT": "1"}


def test_no_variable_of_one_job_reaches_another() -> None:
    assert without_leaks(FULL.to_env() | {"HOME": "/home/a"}) == {"HOME": "/home/a"}
