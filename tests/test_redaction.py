"""Secrets are known by name and by value, and what only looks a little like one is left alone."""

from __future__ import annotations

import pytest

from sousbatch.errors import DamagedError, Fault, RecipeError
from sousbatch.redaction import HIDDEN, holds_secret, is_secret, redacted

# Put together here, so that no scanner takes this file for a leak.
VALUES = [
    "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH",
    "sk-" + "abcdefghijklmnopqrstuvwxyz0123456789abcdefghijkl",
    "sk-proj-" + "Abc_123-def456ghi789jkl",
    "sk-ant-api03-" + "Abc_123-def456ghi789jkl",
    "ghp_" + "0123456789abcdefghijABCDEFGHIJ012345",
    "github_pat_" + "11ABCDEFG0123456789_abcdefghijklmnop",
    "xoxb-" + "123456789012-abcdefghijkl",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "glpat-" + "abcdefghij0123456789",
    "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJl",
    "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "b3BlbnNzaC1rZXk\n-----END OPENSSH PRIVATE KEY-----",
    "postgresql://anna:sesame@db.example.org:5432/runs",
    "http://anna:sesame@proxy.example.org:3128",
    "https:/anna:sesame@example.org/x",
    "https://data.example.org/train.jsonl?X-Amz-Signature=0123abc&X-Amz-Date=1",
]


@pytest.mark.parametrize("value", VALUES)
def test_a_secret_is_known_by_its_value_and_taken_out_of_text(value: str) -> None:
    assert holds_secret(value) and is_secret("NOTE", value)
    text = redacted(f"cannot open '{value}': no route")
    assert text.startswith("cannot open '") and text.endswith("': no route") and HIDDEN in text
    assert not any(part in text for part in ("sesame", "0123", "Abc_123", "aBcD", "IOSF", "abcdefghij", "b3Blb"))


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWD", "AZURE_CREDENTIALS", "OPENAI_KEY"),
        *("GH_PAT", "MYSQL_PWD", "REDIS_PASS", "CI_JOB_JWT", "openaiApiKey"),
    ],
)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name, "sesame-1")


def test_an_older_key_of_wandb_is_a_secret_under_its_name_only() -> None:
    assert is_secret("WANDB_LOGIN", "0123456789" * 4) and not is_secret("COMMIT", "0123456789" * 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://proxy.example.org:3128"),
        ("PATH", "/usr/bin:/bin"),
        ("OLDPWD", "/home/anna"),
        ("PWD", "/home/anna"),
        ("SSH_AUTH_SOCK", "/run/user/1000/ssh"),
        ("MAX_TOKENS", "512"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("KEYBOARD", "de"),
        ("WANDB_PROJECT", "hangul"),
        ("SSL_KEY", "/etc/ssl/own.pem"),
        ("COMMIT", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
        ("DIGEST", "sha256:" + "e3b0c44298fc1c149afbf4c8996fb924" * 2),
        ("RUN", "c70db529c96e-2"),
        ("MODEL", "hf-internal-testing/tiny-random-gpt2"),
        ("MODEL", "hf_internal_testing/tiny"),
        ("MODEL", "sk-learn-baseline-of-the-tabular-kind"),
        ("MODEL", "meta-llama/Llama-3.1-8B-Instruct@main"),
        ("DATA", "hf://datasets/org/name/train.jsonl"),
        ("DATA", "s3://bucket/a:b/c@d.jsonl"),
        ("DATA", "https://example.org:8080/x@y?rows=10"),
        ("REMOTE", "ssh://git@example.org/repository"),
        ("REMOTE", "git@example.org:repository"),
        ("IMAGE", "docker://nvcr.io/nvidia/pytorch:24.05-py3"),
        ("PROMPT", "Translate: {source}\nAnswer@home:"),
        ("LS_COLORS", "rs=0:di=01;34:*.tar=01;31"),
    ],
)
def test_what_is_no_secret_passes(name: str, value: str) -> None:
    assert not is_secret(name, value) and redacted(value) == value


def test_errors_print_no_secret() -> None:
    url = "https://anna:sesame@example.org/x"
    assert "sesame" not in str(DamagedError(f"{url}: cut off")) and "example.org/x: cut off" in str(
        DamagedError(f"{url}: cut off")
    )
    assert "sesame" not in str(RecipeError("r", [Fault(key="model.path", problem=f"is {url!r}")]))
