"""Whatever is done to an event after it was written shows in the chain of hashes."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path

import pytest
from sqlalchemy import select, update
from trio.testing import MockClock

from tests.unit.journal.journal_kit import FOREIGN_KEYS_OFF, new_home, opened, session, written
from tink.errors import UserError
from tink.home import Home
from tink.journal import chain, schema
from tink.journal.chain import Head


async def _written(folder: Path) -> Home:
    """Ten events, of two workers."""
    home = new_home(folder)
    async with opened(home) as journal:
        await journal.append(session(1), session(2), session("abc"))
    async with opened(home) as journal:
        await journal.append(*(session(number) for number in range(4, 7)))
    return home


def _breaks(home: Home, *statements: str, noted: Head | None = None) -> list[str]:
    """What is found after the statements."""
    with written(home) as connection:
        connection.exec_driver_sql(FOREIGN_KEYS_OFF[connection.dialect.name])
        connection.commit()
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.commit()
        return list(chain.breaks(connection, noted))


def _head(home: Home) -> Head:
    with written(home) as connection:
        return chain.head(connection)


async def test_what_workers_wrote_is_one_chain(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = await _written(tmp_path)
    assert _breaks(home) == []
    assert _head(home).seq == 10
    assert _breaks(home, noted=_head(home)) == []


CHANGES = {
    "its time": "UPDATE events SET at = at + 1 WHERE seq = 4",
    "its kind": "UPDATE events SET kind = 'job_done' WHERE seq = 4",
    "its worker": "UPDATE events SET incarnation = 9 WHERE seq = 4",
    "whose it is": "UPDATE events SET tenant = 'other' WHERE seq = 4",
    "whom it is about": "UPDATE events SET session_id = 's9' WHERE seq = 4",
    "what it says": 'UPDATE events SET data = \'{"tags": ["9"]}\' WHERE seq = 4',
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_changed_row_is_named(autojump_clock: MockClock, tmp_path: Path, change: str) -> None:
    found, *_ = _breaks(await _written(tmp_path), CHANGES[change])
    assert "event 4 is not what was written" in found


# These have the same hash. Of the bytes the base64 is the text that was there.
CHANGES_OF_FILES = {
    "its hash": "UPDATE events SET hash = 'text' WHERE seq = 4",
    "bytes for a text": f"UPDATE events SET session_id = x'{b64decode('sabc').hex()}' WHERE seq = 4",
    "bytes for JSON": "UPDATE events SET data = CAST(data AS BLOB) WHERE seq = 4",
    "a key twice": """UPDATE events SET data = '{"sdk_version":"9",' || substr(data, 2) WHERE seq = 4""",
    "no JSON": "UPDATE events SET data = '{' WHERE seq = 4",
}


@pytest.mark.on_files
@pytest.mark.parametrize("change", CHANGES_OF_FILES)
async def test_a_row_of_a_file_that_only_looks_the_same_is_named(
    autojump_clock: MockClock, tmp_path: Path, change: str
) -> None:
    found, *_ = _breaks(await _written(tmp_path), CHANGES_OF_FILES[change])
    expected = "behind 3 cannot be read" if change == "no JSON" else "event 4 is not what was written"
    assert expected in found


async def test_a_removed_row_is_named(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = await _written(tmp_path)
    assert _breaks(home, "DELETE FROM events WHERE seq IN (4, 5)") == ["no events from 4 to 5"]


async def test_a_removed_row_whose_place_was_closed_is_named(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    later = [f"UPDATE events SET seq = {seq - 1} WHERE seq = {seq}" for seq in range(5, 11)]
    found = _breaks(await _written(tmp_path), "DELETE FROM events WHERE seq = 4", *later)
    assert found[0] == "event 4 is not what was written behind event 3"


async def test_rows_in_another_order_are_named(autojump_clock: MockClock, tmp_path: Path) -> None:
    swap = [f"UPDATE events SET seq = {new} WHERE seq = {old}" for old, new in ((3, 99), (4, 3), (99, 4))]
    found = _breaks(await _written(tmp_path), *swap)
    assert [line.partition(" is not")[0] for line in found] == ["event 3", "event 4", "event 5"]


async def test_a_row_whose_hash_was_made_to_fit_breaks_the_next(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = await _written(tmp_path)
    with written(home) as connection, connection.begin():
        connection.exec_driver_sql("UPDATE events SET tenant = 'other' WHERE seq = 4")
        columns = [schema.events.c[name] for name in (*chain.COLUMNS, "hash")]
        before, row = (
            dict(connection.execute(select(*columns).where(schema.events.c.seq == seq)).mappings().one())
            for seq in (3, 4)
        )
        made = chain.link(before["hash"], row)
        connection.execute(update(schema.events).where(schema.events.c.seq == 4).values(hash=made))
    assert _breaks(home) == ["event 5 is not what was written behind event 4"]


async def test_an_end_that_was_cut_off_shows_by_a_noted_head(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = await _written(tmp_path)
    noted = _head(home)
    assert _breaks(home, "DELETE FROM events WHERE seq > 8") == []
    (found,) = _breaks(home, noted=noted)
    assert found == "event 10, whose hash was noted, is not there: the last one is 8"


async def test_a_chain_that_was_made_anew_shows_by_a_noted_head(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = await _written(tmp_path / "one")
    noted = _head(home)
    other = new_home(tmp_path / "other")
    async with opened(other) as journal:
        await journal.append(*(session(number) for number in range(20)))
    (found,) = _breaks(other, noted=noted)
    assert "not the noted" in found


def test_a_head_is_read_as_it_is_printed() -> None:
    head = Head(4711, bytes(range(32)))
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize("text", ["", "5", "x:00", "5:zz", "5:00", f"0:{'00' * 32}"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no head"):
        Head.parse(text)


def test_the_hash_of_an_event_never_changes() -> None:
    """Or every journal that was ever written would look forged."""
    row = {
        "seq": 7,
        "at": 1.5,
        "incarnation": 2,
        "kind": "session_created",
        "tenant": "t",
        "session_id": "s",
        "model_id": None,
        "job_id": None,
        "adapter_id": None,
        "replica": None,
        "data": {"tags": ["a"], "user_metadata": {"z": 1, "b": [1.5, None, "ü"]}},
    }
    golden = "d9c098e0695ff86201b7af1f7c8ac52f9f122e6dc98a9afe32f6006a374ddd0b"
    assert chain.link(chain.START, row).hex() == golden
