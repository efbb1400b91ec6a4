"""Bodies that came ahead of their operations: so many and no more, each until it is taken."""

from __future__ import annotations

import pytest

from tink.trainer import bodies
from tink.trainer.bodies import Bodies


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Bodies:
    monkeypatch.setattr(bodies, "TRAINER_BODIES", 3)
    monkeypatch.setattr(bodies, "TRAINER_BODIES_BYTES", 10)
    return Bodies()


def test_a_body_is_there_until_it_is_taken(kept: Bodies) -> None:
    kept.keep("a", b"1")
    assert kept.take("b") is None
    assert kept.take("a") == b"1"
    assert kept.take("a") is None


@pytest.mark.parametrize(("size", "left"), [(1, "bcd"), (4, "cd"), (10, "d"), (11, "")])
def test_the_oldest_go_when_there_are_too_many_or_too_large_ones(
    kept: Bodies, size: int, left: str
) -> None:
    for name in "abcd":
        kept.keep(name, name.encode() * size)
    assert "".join(name for name in "abcd" if kept.take(name)) == left
    assert kept._bytes == 0


def test_one_that_comes_again_is_the_youngest_and_counts_once(kept: Bodies) -> None:
    for name in "abcad":
        kept.keep(name, b"1234"[:3])
    assert [kept.take(name) is not None for name in "abcd"] == [True, False, True, True]
