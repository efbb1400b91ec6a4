"""Published whole or not at all, verified when read, and never outside the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tink.errors import BackendError, NotFound, UserError
from tink.trainer.artifacts import Artifacts


def two_files(directory: Path) -> None:
    (directory / "a").write_bytes(b"aa")
    (directory / "b").write_bytes(b"bbb")


def listing(artifacts: Artifacts) -> set[str]:
    return {path.relative_to(artifacts.root).as_posix() for path in artifacts.root.rglob("*")}


def test_what_was_published_is_read_back(artifacts: Artifacts) -> None:
    files = artifacts.publish("x/y", "origin", {"step": 3}, two_files)
    assert [(file.name, file.size) for file in files] == [("a", 2), ("b", 3)]
    directory, manifest = artifacts.open("x/y")
    assert (directory / "b").read_bytes() == b"bbb"
    assert (manifest.origin, manifest.about, manifest.files) == ("origin", {"step": 3}, files)


def test_a_failure_leaves_nothing(artifacts: Artifacts) -> None:
    def fail(directory: Path) -> None:
        two_files(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        artifacts.publish("x", "o", {}, fail)
    assert listing(artifacts) == {".tmp"}
    with pytest.raises(NotFound):
        artifacts.open("x")


def test_a_published_path_never_changes(artifacts: Artifacts) -> None:
    files = artifacts.publish("x", "job 1", {}, two_files)

    def never(directory: Path) -> None:
        raise AssertionError

    assert artifacts.publish("x", "job 1", {}, never) == files
    with pytest.raises(BackendError, match="made by job 1"):
        artifacts.publish("x", "job 2", {}, never)


@pytest.mark.parametrize("content", [b"ab", b"a", b"aaa", None])
def test_damage_is_found(artifacts: Artifacts, content: bytes | None) -> None:
    artifacts.publish("x", "o", {}, two_files)
    file = artifacts.root / "x" / "a"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(BackendError, match="x/a is damaged"):
        artifacts.open("x")


@pytest.mark.parametrize("path", ["", "/etc", "../x", "a/../../x", ".", "a\0b", ".tmp/writer-0"])
def test_no_path_leads_out(artifacts: Artifacts, path: str) -> None:
    with pytest.raises(UserError):
        artifacts.publish(path, "o", {}, two_files)


def test_no_symbolic_link_leads_out(artifacts: Artifacts, tmp_path: Path) -> None:
    artifacts.publish("x", "o", {}, two_files)
    (artifacts.root / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out"):
        artifacts.publish("link/new", "o", {}, two_files)


def test_a_directory_that_tink_did_not_publish_is_no_artifact(artifacts: Artifacts) -> None:
    (artifacts.root / "x").mkdir(parents=True)
    with pytest.raises(BackendError, match=r"manifest\.json"):
        artifacts.open("x")
    (artifacts.root / "x" / "manifest.json").write_text(
        '{"format": "tink-artifact/1", "origin": "", "about": {},'
        ' "files": [{"name": "../secret", "size": 1, "sha256": ""}]}'
    )
    with pytest.raises(BackendError, match="is not a tink-artifact/1"):
        artifacts.open("x")
