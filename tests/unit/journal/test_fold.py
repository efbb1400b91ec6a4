"""J6: whatever the history, and however it fell into batches, the tables are the fold of the events, and
so are the ledger in memory and the state after a restart."""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.journal.histories import Entry, histories
from tests.unit.journal.journal_kit import new_home, opened
from tink.domain import events, rows
from tink.domain.projection import Ledger, fold, project
from tink.journal import store
from tink.journal.database import reader_engine

# In memory where there is such a folder: syncs to a disk are what takes the time here.
FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


def _open_only(ledger: Ledger) -> Ledger:
    kept = Ledger()
    for name, table in ledger.tables.items():
        kept.tables[name] = {
            key: row
            for key, row in table.items()
            if not isinstance(row, rows.Job) or row.state in rows.OPEN
        }
    return kept


@settings(max_examples=30, deadline=None)
@given(history=histories(), sizes=st.lists(st.integers(1, 6), min_size=25, max_size=25))
def test_tables_ledger_and_fold_are_the_same_after_any_history(
    history: list[Entry], sizes: list[int]
) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        trio.run(_compare, Path(folder), history, sizes)


async def _compare(folder: Path, history: list[Entry], sizes: list[int]) -> None:
    home = new_home(folder)
    async with opened(home) as journal:
        rest = list(history)
        for size in sizes:
            await journal.append(*rest[:size])
            rest = rest[size:]
        engine = reader_engine(home.journal)
        with engine.connect() as connection:
            records = list(store.read_events(connection))
            stored = store.read_tables(connection, closed_jobs=True)
            open_jobs = store.read_tables(connection, closed_jobs=False)
        engine.dispose()
        assert [(r.subject, r.event) for r in records][1:] == history
        folded = fold(records)
        assert list(folded.differences(stored)) == []
        assert list(_open_only(folded).differences(journal.ledger)) == []
        assert list(_open_only(folded).differences(open_jobs)) == []
    # And the next worker takes up what this one left.
    async with opened(home) as journal:
        left, found = _open_only(folded), _open_only(journal.ledger)
        for ledger in (left, found):
            ledger.tables["incarnations"] = {}
        assert list(left.differences(found)) == []


@settings(max_examples=50, deadline=None)
@given(histories(60))
def test_a_fold_depends_on_nothing_but_the_events(history: list[Entry]) -> None:
    records = [
        events.Record(seq, 5.0, 1, subject, event) for seq, (subject, event) in enumerate(history, 1)
    ]
    assert list(fold(records).differences(fold(records))) == []
    # The same when it is folded in two parts.
    ledger = fold(records[: len(records) // 2])
    for record in records[len(records) // 2 :]:
        ledger.apply(project(record))
    assert list(ledger.differences(fold(records))) == []
