"""Directories leave the artifact folder whole, and never under somebody's hands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import trio

from tests.unit.journal.journal_kit import InlineWorld
from tink.actors.artifacts import ArtifactFolder
from tink.domain import rows
from tink.errors import BackendError

MODEL = rows.Model(
    model_id=f"{'5' * 32}:train:3",
    tenant="t",
    session_id="5" * 32,
    model_seq_id=3,
    op_no=123456789,
    created_at=0.0,
    last_request_at=0.0,
)
HERE = f"{'5' * 32}/3"


@pytest.fixture
def folder(tmp_path: Path) -> ArtifactFolder:
    return ArtifactFolder(tmp_path / "artifacts", InlineWorld())


def _make(folder: ArtifactFolder, *names: str) -> None:
    for name in names:
        (folder.root / name).mkdir(parents=True)
        (folder.root / name / "file").write_bytes(b"content")


async def test_only_what_operations_of_these_models_made_is_listed(folder: ArtifactFolder) -> None:
    assert await folder.published([MODEL]) == []
    mine = [f"{HERE}/00000001-save_weights", f"{HERE}/123456789-snapshot"]
    others = [
        f"{HERE}/notes",
        f"{HERE}/1-snapshot",
        f"{'5' * 32}/4/00000001-snapshot",
        "a/b/00000001-snapshot",
    ]
    _make(folder, *mine, *others)
    assert await folder.published([MODEL]) == mine
    assert await folder.published([]) == []


async def test_a_directory_that_is_removed_is_gone_and_so_is_its_trace(folder: ArtifactFolder) -> None:
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name)
    assert await folder.remove(name)
    assert not await folder.remove(name)
    assert list(folder.root.glob("**/file")) == []
    assert list((folder.root / ".tmp").iterdir()) == []
    assert await folder.published([MODEL]) == []


async def test_a_directory_that_is_used_is_not_removed_until_its_last_user_is_done(
    folder: ArtifactFolder,
) -> None:
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name)
    with folder.use(name):
        with folder.use(name):
            assert folder.used == {name}
            assert not await folder.remove(name)
        assert not await folder.remove(name)
    assert folder.used == set()
    assert await folder.remove(name)


async def test_a_directory_that_is_being_removed_cannot_be_used(tmp_path: Path) -> None:
    world = InlineWorld()
    folder = ArtifactFolder(tmp_path, world)
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name)
    world.block = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(folder.remove, name)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BackendError, match="being removed"), folder.use(name):
            pass
        assert not await folder.remove(name)
        world.block.set()
    with folder.use(name):
        pass


async def test_a_removal_that_is_cut_short_leaves_no_half_of_a_directory_and_is_finished_later(
    folder: ArtifactFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: die())
        with pytest.raises(Killed):
            await folder.remove(name)
    assert not (folder.root / name).exists()
    assert len(list((folder.root / ".tmp").iterdir())) == 1
    [left] = await folder.unfinished([])
    assert await folder.size(left) == len("content")
    await folder.clear(left)
    assert list((folder.root / ".tmp").iterdir()) == []


async def test_what_cannot_be_removed_is_left_and_hurts_nobody(
    folder: ArtifactFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert not await folder.remove(name)
    assert (folder.root / name / "file").exists()
    assert folder.used == set()


async def test_only_dead_servers_scratch_is_cleared(folder: ArtifactFolder) -> None:
    assert await folder.unfinished(["dead"]) == []  # of a folder that is not there yet
    _make(folder, ".tmp/dead-0", ".tmp/dead-12", ".tmp/alive-0", ".tmp/deadly-0", ".tmp/removed-1")
    assert await folder.unfinished(["dead"]) == [".tmp/dead-0", ".tmp/dead-12", ".tmp/removed-1"]
    for name in await folder.unfinished(["dead"]):
        await folder.clear(name)
    assert {path.name for path in (folder.root / ".tmp").iterdir()} == {"alive-0", "deadly-0"}


async def test_a_directory_is_as_large_as_its_files_and_one_that_is_gone_is_nothing(
    folder: ArtifactFolder,
) -> None:
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name)
    (folder.root / name / "inside").mkdir()
    (folder.root / name / "inside" / "file").write_bytes(bytes(1000))
    assert await folder.size(name) == 1000 + len("content")
    assert await folder.size(f"{HERE}/00000002-snapshot") == 0


async def test_a_directory_that_goes_while_it_is_measured_is_no_error(
    folder: ArtifactFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever let a version go removes its files, while retention looks what is left."""
    name = f"{HERE}/00000001-snapshot"
    _make(folder, name, f"{name}/inside")
    lstat = Path.lstat

    def gone(path: Path) -> os.stat_result:
        found = lstat(path)
        shutil.rmtree(folder.root / name)
        return found

    monkeypatch.setattr(Path, "lstat", gone)
    assert await folder.size(name) == len("content")


async def test_folders_of_models_are_listed_and_go_once_they_are_empty(folder: ArtifactFolder) -> None:
    other = f"{'6' * 32}/12"
    _make(folder, f"{HERE}/00000001-snapshot", f"{other}/00000001-snapshot")
    assert set(await folder.models()) == {MODEL.model_id, f"{'6' * 32}:train:12"}
    await folder.remove(f"{HERE}/00000001-snapshot")
    await folder.remove_empty([HERE, "5" * 32, other, "6" * 32, "nobody"])
    assert await folder.models() == [f"{'6' * 32}:train:12"]
    assert not (folder.root / ("5" * 32)).exists()
