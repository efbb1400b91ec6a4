"""J6: whatever the history, and however it fell into batches, the tables are the fold of the events, and
so are the ledger in memory and the state after a restart."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.unit.journal.histories import Entry, histories
from tests.unit.journal.journal_kit import new_home, opened
from tink.domain import events
from tink.domain.ledger import Ledger, fold
from tink.domain.memory import forgettable
from tink.domain.projection import project
from tink.journal import chain, store
from tink.journal.reader import open_journal

# In memory where there is such a folder: syncs to a disk are what takes the time here.
FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


def _present(ledger: Ledger) -> Ledger:
    """What of it a worker has in memory from its start, and goes on with."""
    kept = Ledger()
    for name in ("sessions", "models", "samplers", "jobs", "adapters", "checkpoints", "snapshots"):
        for row in ledger.tables[name].values():
            if not row.ended:
                kept.put(name, row)
    for table, id_ in list(forgettable(kept, ())):
        kept.forget(table, (id_,))
    return kept


def _told(subject: events.Subject, event: events.AnyEvent) -> Any:
    """Whichever database it comes from: numbers that are the same are, and no text has a NUL."""
    text = msgspec.json.encode(chain.canonical(msgspec.to_builtins([subject, event])), order="sorted")
    return text.replace(b"\\u0000", "\N{REPLACEMENT CHARACTER}".encode())


# Every failure costs a database: it is not made smaller.
@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    history=histories(),
    sizes=st.lists(st.integers(1, 6), min_size=25, max_size=25),
    checked=st.integers(0, 30),
)
def test_tables_ledger_and_fold_are_the_same_after_any_history(
    history: list[Entry], sizes: list[int], checked: int
) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder, pytest.MonkeyPatch.context() as patch:
        # Wherever the part begins that a start looks at, a whole journal is whole.
        patch.setattr(store, "CHECKED_EVENTS", checked)
        trio.run(_compare, Path(folder), history, sizes)


async def _compare(folder: Path, history: list[Entry], sizes: list[int]) -> None:
    home = new_home(folder)
    async with opened(home) as journal:
        rest = list(history)
        for size in sizes:
            await journal.append(*rest[:size])
            rest = rest[size:]
        with open_journal(home) as connection:
            records = list(store.read_events(connection))
            stored = store.read_tables(connection)
            present = store.read_present(connection)
        assert [_told(record.subject, record.event) for record in records][1:] == [
            _told(*entry) for entry in history
        ]
        folded = fold(records)
        assert list(folded.differences(stored)) == []
        assert list(_present(folded).differences(present)) == []
        assert list(_present(folded).differences(_present(journal.ledger))) == []
        assert not any(row.ended for table in journal.ledger.tables.values() for row in table.values())
    # And the next worker takes up what this one left.
    async with opened(home) as journal:
        assert list(_present(folded).differences(_present(journal.ledger))) == []


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
