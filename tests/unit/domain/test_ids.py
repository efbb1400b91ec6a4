"""Ids, addresses, directories: round trips, and no name ever leaves its place."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tink.domain import ids
from tink.domain.ids import Address
from tink.errors import UserError
from tink.limits import MAX_NAME

sessions = st.text("0123456789abcdef", min_size=32, max_size=32)
numbers = st.integers(0, 2**40)
GOOD = ["a", "1", "step-000100", "final_v1.2", "a@b", "a+b=c", "X" * MAX_NAME]
BAD = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a..b",
    ".hidden",
    "-rf",
    "_x",
    "a b",
    "a\n",
    "a\0",
    "a%2e%2e",
    "a;b",
    "$(id)",
    "`id`",
    "größe",
    "a\u202eb",
    "٣",
    "con:",
    "~",
    "a?b",
    "a#b",
    "X" * (MAX_NAME + 1),
]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("kind", ids.KINDS)
def test_a_good_name_makes_an_address_that_reads_back(name: str, kind: ids.CheckpointKind) -> None:
    address = Address("s:train:0", kind, ids.check_name(name))
    assert str(address) == f"tinker://s:train:0/{kind}/{name}"
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        ids.check_name(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(UserError):
        Address.parse(f"tinker://m/weights/{name}")


@given(st.text(max_size=200))
def test_no_text_passes_as_a_name_that_could_leave_its_folder(text: str) -> None:
    try:
        name = ids.check_name(text)
    except UserError:
        return
    assert name == text
    assert PurePosixPath(name).parts == (name,)
    assert PurePosixPath("/root").joinpath(name).parent == PurePosixPath("/root")
    assert name.isascii()
    assert name.isprintable()
    assert not name.startswith(("-", "."))


@given(st.text(max_size=80) | st.text("tinker:/weights.", max_size=40))
def test_any_text_is_an_address_or_a_user_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except UserError:
        return
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tinker://",
        "tinker://m",
        "tinker://m/weights",
        "tinker://m/weights/a/b",
        "tinker://m/other/a",
        "tinker:///weights/../a",
        "TINKER://m/weights/a",
        "file:///m/weights/a",
        "m/weights/a",
        "tinker://m/weights/a ",
        " tinker://m/weights/a",
        "tinker://tinker://m/weights/a",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        Address.parse(text)


@given(sessions, numbers, numbers)
def test_ids_of_different_things_differ_and_tell_their_owner(session: str, number: int, seq: int) -> None:
    model, sampler = ids.model_id(session, number), ids.sampler_id(session, number)
    assert len({model, sampler, ids.job_id(model, seq), ids.job_id(sampler, seq)}) == 4
    assert ids.job_id(model, seq).rpartition(":")[0] == model
    assert model.partition(":")[0] == session
    assert ids.sequence_ids(ids.job_id(sampler, seq), 3) == [f"{sampler}:{seq}:{i}" for i in range(3)]
    assert ids.adapter_id(model, 7) == f"{model}@7"


@given(sessions, numbers, st.integers(1, 10**8 - 1), st.integers(1, 10**8 - 1))
def test_directories_are_relative_distinct_and_in_the_order_of_their_ops(
    session: str, number: int, op_no: int, other: int
) -> None:
    model = ids.model_id(session, number)
    directory = ids.directory(model, op_no, "save_weights")
    parts = PurePosixPath(directory).parts
    assert parts[:2] == (session, str(number))
    assert not PurePosixPath(directory).is_absolute()
    assert ".." not in parts
    assert (directory < ids.directory(model, other, "save_weights")) == (op_no < other)
