"""A bundle holds all that belongs to a model and nothing else, and shows what was changed in it."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import zstandard
from sqlalchemy import select, text

import tink
from tests.simulation import golden
from tink.cli.main import main
from tink.cli.replay import MODES, spelled_out
from tink.domain.ledger import Ledger, fold
from tink.errors import StartupError, UserError
from tink.home import Home
from tink.journal import schema, store
from tink.journal.recording import open_recording
from tink.journal.sqlite import writer_engine
from tink.replay import bundle


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("golden") / "home")
    golden.read(golden.GOLDEN / tink.__version__ / "trainer", made)
    return made


@pytest.fixture(scope="module")
def model(home: Home) -> str:
    """The one with the most steps."""
    with open_recording(home) as recording:
        query = select(schema.models.c.model_id).order_by(schema.models.c.steps.desc()).limit(1)
        return str(recording.journal.execute(query).scalar_one())


@pytest.fixture
def file(home: Home, model: str, tmp_path: Path) -> Path:
    bundle.write(home, home.artifacts, model, tmp_path / "run.tink", redact=False, now=5.0)
    return tmp_path / "run.tink"


def _state(home: Home, model: str) -> Ledger:
    with open_recording(home) as recording:
        return fold(recording.records_of(model))


def test_the_state_of_the_model_is_that_of_its_home(home: Home, model: str, file: Path) -> None:
    with bundle.opened(file) as carried:
        assert list(_state(carried, model).differences(_state(home, model))) == []
        with open_recording(carried) as recording:
            folded = fold(recording.records())
            assert list(folded.differences(store.read_tables(recording.journal))) == []
            assert set(folded.models) == {(model,)}


def test_every_body_of_the_model_is_in_it(home: Home, model: str, file: Path) -> None:
    with (
        bundle.opened(file) as carried,
        open_recording(carried) as recording,
        open_recording(home) as whole,
    ):
        digests = {
            digest
            for job in _state(home, model).jobs.values()
            for digest in (job.body_sha256, job.result_sha256)
            if digest is not None
        }
        assert digests
        assert recording.stored(digests) == whole.stored(digests)
        for digest in whole.stored(digests):
            assert recording.body(digest) == whole.body(digest)


def test_each_event_has_the_hash_that_it_had_in_its_journal(file: Path) -> None:
    with bundle.opened(file) as carried:
        found = bundle.about(carried)
        assert found is not None
        assert list(bundle.broken(carried, found)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("UPDATE events SET data = json_set(data, '$.run_ms', 0.5) WHERE seq = {seq}", "is not what was"),
        ("UPDATE events SET tenant = 'other' WHERE seq = {seq}", "is not what was"),
        ("DELETE FROM events WHERE seq = {seq}", "no events from"),
    ],
)
def test_an_event_that_was_changed_in_it_is_named(file: Path, change: str, told: str) -> None:
    with bundle.opened(file) as carried:
        found = bundle.about(carried)
        assert found is not None
        with open_recording(carried) as recording:
            query = select(schema.events.c.seq).where(schema.events.c.kind == "job_done")
            # The event behind it is there too: only what was left out before has its hash noted.
            seq = next(s for s in recording.journal.execute(query).scalars() if s + 1 not in found.before)
        engine = writer_engine(carried.journal)
        with engine.begin() as connection:
            connection.exec_driver_sql(change.format(seq=seq))
        engine.dispose()
        (line,) = bundle.broken(carried, found)
        assert told in line


def test_a_redacted_bundle_has_the_shapes_and_no_body(home: Home, model: str, tmp_path: Path) -> None:
    file = tmp_path / "redacted.tink"
    made = bundle.write(home, home.artifacts, model, file, redact=True, now=5.0)
    assert made.redacted
    content = zstandard.ZstdDecompressor().decompressobj().decompress(file.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = archive.getnames()
        assert names == ["bundle.json", "journal.sqlite", "bodies.sqlite", "shapes.jsonl"]
        shapes = archive.extractfile("shapes.jsonl")
        assert shapes is not None
        lines = [json.loads(line) for line in shapes]
    assert len(lines) == made.bodies > 0
    sampled = next(line["shape"] for line in lines if (line["op"], line["part"]) == ("sample", "request"))
    assert sampled["prompt"]["chunks"][0]["tokens"].endswith(" numbers")
    with open_recording(home) as whole:
        for line in lines:
            assert whole.body(line["sha256"]) not in content
    with bundle.opened(file) as carried, open_recording(carried) as recording:
        assert recording.stored({line["sha256"] for line in lines}) == set()


def test_a_file_that_is_there_is_never_written_over(home: Home, model: str, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        bundle.write(home, home.artifacts, model, file, redact=False, now=5.0)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@contextmanager
def _damaged(home: Home, folder: Path, database: str, statement: str) -> Iterator[Home]:
    made = Home(folder)
    shutil.copytree(home.root, made.root)
    engine = writer_engine(getattr(made, database))
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()
    yield made


@pytest.mark.parametrize(
    ("database", "statement", "told"),
    [
        ("bodies", "UPDATE bodies SET content = x'00'", "is damaged on disk"),
        (
            "journal",
            "UPDATE events SET data = '{}' WHERE kind = 'job_accepted'",
            "event",
        ),
    ],
)
def test_an_export_of_a_damaged_home_is_one_line_and_leaves_nothing(
    home: Home, model: str, tmp_path: Path, database: str, statement: str, told: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with (
        _damaged(home, tmp_path / "home", database, statement) as damaged,
        pytest.raises(StartupError, match=rf"is damaged: .*{told}.*'tink db check' tells more"),
    ):
        bundle.write(damaged, damaged.artifacts, model, folder / "run.tink", redact=False, now=5.0)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(
    home: Home, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StartupError, match=r"run\.tink cannot be written: No space left"):
        bundle.write(home, home.artifacts, model, tmp_path / "run.tink", redact=False, now=5.0)


def test_a_state_that_goes_while_it_is_packed_is_named(
    home: Home, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "_directories", lambda *_: ["weights/gone"])
    with pytest.raises(StartupError, match=r"weights/gone cannot be read: .*export once more"):
        bundle.write(home, home.artifacts, model, tmp_path / "run.tink", redact=False, now=5.0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_named_as_a_mode_is_not_taken_for_a_bundle(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for mode in MODES:
        (tmp_path / mode).touch()
        assert spelled_out([mode, "--help"]) == [mode, "--help"]
    (tmp_path / "run").touch()
    assert spelled_out(["run"]) == ["file", "run"]


def test_what_needs_a_whole_home_says_so_of_a_bundle(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "decisions", "--home", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not a folder, and this needs a whole home" in line


def test_the_incidents_of_a_bundle_are_those_of_its_home(home: Home, file: Path) -> None:
    """Though the events before them may be left out."""
    query = text("SELECT kind, detail FROM v_incidents WHERE kind = 'worker_crash' ORDER BY seq")
    with bundle.opened(file) as carried:
        found = []
        for one in (home, carried):
            with open_recording(one) as recording:
                found.append(recording.journal.execute(query).all())
        assert found[0] == found[1] != []


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(home: Home, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model nobody"):
        bundle.write(home, home.artifacts, "nobody", tmp_path / "x", redact=False, now=5.0)
    with pytest.raises(UserError, match="there is no folder"):
        bundle.write(home, home.artifacts, "nobody", tmp_path / "a" / "x", redact=False, now=5.0)
    assert list(tmp_path.iterdir()) == []


def _archive(path: Path, about: bytes | None) -> Path:
    with zstandard.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        if about is not None:
            info = tarfile.TarInfo("bundle.json")
            info.size = len(about)
            archive.addfile(info, io.BytesIO(about))
    return path


@pytest.mark.parametrize(
    ("about", "told"),
    [
        (None, "it has no bundle.json"),
        (b"{}", "cannot be read"),
        (b"[", "cannot be read"),
        (b'{"format": "tink-bundle/9"}', "has format 'tink-bundle/9'"),
        (b'{"format": "tink-bundle/1"}', "cannot be read"),
    ],
)
def test_what_is_no_bundle_is_one_line(tmp_path: Path, about: bytes | None, told: str) -> None:
    file = _archive(tmp_path / "x.tink", about)
    with pytest.raises(StartupError, match=told), bundle.opened(file):
        pass


@pytest.mark.parametrize("content", [b"", b"text", bytes(1000)])
def test_a_file_of_anything_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(StartupError, match="is no bundle of 'tink export'"), bundle.opened(tmp_path / "x"):
        pass


def test_a_file_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    with zstandard.open(tmp_path / "x", "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO(b""))
    with pytest.raises(StartupError, match="is no bundle"), bundle.opened(tmp_path / "x"):
        pass
    assert not (tmp_path.parent / "outside").exists()


def test_the_other_commands_take_a_bundle_for_a_home(
    file: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sql", "--home", str(file), "--format", "csv", "SELECT model_id FROM models"]) == 0
    assert capsys.readouterr().out == f"model_id\n{model}\n"
    assert main(["replay", "state", "--home", str(file), "--table", "models", "--format", "json"]) == 0
    assert [row["model_id"] for row in json.loads(capsys.readouterr().out)["tables"]["models"]] == [model]
    assert main(["audit", "steps", "--home", str(file)]) == 0


def test_a_redacted_bundle_is_replayed_as_far_as_it_goes(
    home: Home, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.tink"
    assert main(["export", model, str(file), "--redact", "--home", str(home.root)]) == 0
    assert main(["replay", str(file)]) == 0
    told = capsys.readouterr()
    assert "each event has its hash" in told.out
    assert "its training cannot be replayed" in told.err
