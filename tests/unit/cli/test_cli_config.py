"""`tink config` tells what `tink serve` would do, and what is wrong, before it is started."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tink.settings import Settings

KEY = "tml-a-key-of-alice"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for field in fields(Settings):
        for name in field.metadata["names"]:
            monkeypatch.delenv(name, raising=False)


def test_every_setting_has_a_line_with_its_value_and_where_it_comes_from(tink, monkeypatch, tmp_path):
    monkeypatch.setenv("PORT", "8500")
    monkeypatch.setenv("USE_VLLM", "yes")
    monkeypatch.setenv("COLUMNS", "400")  # A line each, however long the path is.
    code, out, err = tink("config", "--home", tmp_path)
    assert (code, err) == (0, "")
    mode, empty, head, *lines = out.splitlines()
    assert mode.split(maxsplit=1) == ["mode", "training on none, sampling on vLLM"]
    assert (empty, head.split()[:3]) == ("", ["SETTING", "VALUE", "FROM"])
    assert [line.split()[0] for line in lines] == [f.metadata["names"][0] for f in fields(Settings)]
    values = {line.split()[0]: line.split()[1:3] for line in lines}
    assert values["TINK_PORT"] == ["8500", "PORT"]
    assert values["USE_VLLM"] == ["true", "USE_VLLM"]
    assert values["TINK_HOME"] == [str(tmp_path), "--home"]
    assert values["TINK_ARTIFACTS"] == [str(tmp_path / "artifacts"), "default"]
    assert values["MAX_WORKERS"] == ["4", "default"]


def test_a_program_gets_the_same_as_one_document(tink_json, monkeypatch):
    monkeypatch.setenv("TINK_RETENTION_HOURS", "inf")
    code, document = tink_json("config")
    assert (code, document["mode"], document["problems"]) == (
        0,
        "training on HuggingFace, sampling on HuggingFace",
        [],
    )
    found = {one["name"]: (one["value"], one["source"]) for one in document["settings"]}
    assert found["TINK_RETENTION_HOURS"] == ("inf", "TINK_RETENTION_HOURS")
    assert found["VLLM_API_KEY"] == (None, None)
    assert all(one["help"] for one in document["settings"])


def test_no_key_is_shown(tink, monkeypatch):
    monkeypatch.setenv("TINK_API_KEYS", f"{KEY}=alice")
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("TINK_DATABASE_URL", f"postgresql://tink:{KEY}@localhost/tink?sslpassword={KEY}")
    for arguments in (["config"], ["config", "--json"]):
        code, out, err = tink(*arguments)
        assert code == 0
        assert KEY not in out + err
        assert out.count("***") == 3


def test_everything_that_is_wrong_has_a_line_beside_the_settings(tink, monkeypatch):
    monkeypatch.setenv("TINK_PROT", "1")
    monkeypatch.setenv("TINK_PORT", "99999")
    monkeypatch.setenv("MAX_WORKERS", "many")
    monkeypatch.setenv("VLLM_BASE_URL", "gpu-1")
    monkeypatch.setenv("TINK_CRASH_AT", "nowhere")
    code, out, err = tink("config")
    assert code == 2
    assert len(out.splitlines()) == 3 + len(fields(Settings))
    assert [line.split()[2] for line in err.splitlines()] == [
        "TINK_PROT:",
        "MAX_WORKERS:",
        "TINK_PORT:",
        "VLLM_BASE_URL:",
        "TINK_CRASH_AT:",
    ]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("TINK_HOST", "0.0.0.0", "--no-auth"), ("TINK_API_KEYS", "alone", "KEY=TENANT")],
)
def test_what_serve_would_refuse_is_told(tink, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    code, _, err = tink("config")
    assert (code, len(err.splitlines())) == (2, 1)
    assert says in err
