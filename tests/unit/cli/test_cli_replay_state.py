"""`tink replay state` tells how it was at any point, what differs, and steps through it by commands that
may come from a pipe; it changes nothing, and what is wrong is one line."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from cli_home import BEGAN, MADE, MODEL, REFUSED, SECRET, SESSION, TRAINED, alter, files

from tink.cli import printing
from tink.home import Home
from tink.journal.journal import prepare
from tink.journal.reader import open_journal
from tink.limits import STATE_ROWS
from tink.replay.steps import Walk

LAST = 17


@pytest.fixture
def replay(tink, home):
    """`tink replay state` on the home: its output."""

    def run(*arguments):
        code, out, err = tink("replay", "state", "--home", home.root, *arguments)
        assert (code, err) == (0, "")
        return out

    return run


@pytest.fixture
def replay_json(replay):
    return lambda *arguments: json.loads(replay(*arguments, "--format", "json"))


@pytest.fixture
def refused(tink, home):
    """The one line of `tink replay state`, which refuses."""

    def run(*arguments):
        code, out, err = tink("replay", "state", "--home", home.root, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("tink replay: ")
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def step(replay, monkeypatch):
    """A conversation: what is said to these lines, without the line that it begins with."""

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return replay("--step", *options).splitlines()[1:]

    return run


def _stored(home, table):
    with open_journal(home) as connection:
        found = connection.exec_driver_sql(f"SELECT * FROM {table}")
        return [dict(row) for row in found.mappings()]


def test_the_state_at_the_end_is_what_the_tables_have(replay_json, home):
    found = replay_json()
    assert (found["seq"], found["at"]) == (LAST, BEGAN + 100)
    for table in ("models", "jobs", "sessions", "samplers", "adapters", "incarnations"):
        stored = _stored(home, table)
        assert len(found["tables"][table]) == len(stored) > 0
        for row, was in zip(found["tables"][table], stored, strict=True):
            assert row.keys() == was.keys()
            assert all(
                was[name] == value for name, value in row.items() if not isinstance(value, list | dict)
            )


@pytest.mark.parametrize("point", ["9", f"@{BEGAN + 15}", f"@{BEGAN + 19.9}", printing.instant(BEGAN + 15)])
def test_the_state_at_a_point_is_how_it_was(replay_json, point):
    found = replay_json("--at", point)
    assert found["seq"] == 9
    assert [(job["job_id"], job["state"]) for job in found["tables"]["jobs"]] == [
        (MADE, "done"),
        (TRAINED, "done"),
    ]
    assert found["tables"]["adapters"] == []
    assert found["tables"]["incarnations"][0]["stopped_at"] is None


def test_a_state_is_printed_as_tables_with_the_columns_that_say_something(replay):
    out = replay("--at", "8", "--table", "jobs")
    head, _, title, columns, *lines = out.splitlines()
    assert head == f"behind event 8 of {LAST}, {printing.instant(BEGAN + 12)}"
    assert title == "jobs: 2"
    assert "queue_ms" in columns
    assert "error" not in columns
    assert [line.split()[0] for line in lines] == [MADE, TRAINED]
    assert printing.instant(BEGAN + 12) in lines[1]


def test_of_many_rows_the_last_are_printed(replay):
    title, _, row = replay("--table", "jobs", "--max-rows", "1").splitlines()[2:]
    assert title == "jobs: 5, the last 1"
    assert row.startswith(f"{SESSION}:sample:0:0 ")
    assert STATE_ROWS > 5


def test_a_model_and_a_job_can_be_asked_for_alone(replay_json):
    tables = replay_json("--model", MODEL)["tables"]
    assert {name: len(some) for name, some in tables.items() if some} == {
        "sessions": 1,
        "models": 1,
        "jobs": 4,
        "adapters": 1,
    }
    tables = replay_json("--job", TRAINED, "--at", "8")["tables"]
    assert [job["state"] for job in tables["jobs"]] == ["running"]
    assert sum(map(len, tables.values())) == 1
    assert replay_json("--model", MODEL, "--table", "samplers")["tables"] == {"samplers": []}


def test_a_scope_without_rows_says_so(replay):
    assert replay("--model", MODEL, "--table", "samplers").splitlines()[-1] == "no rows"


def test_a_difference_tells_the_rows_made_and_the_columns_changed(replay, replay_json):
    found = replay_json("--diff", "9", "11")
    assert [found[end]["seq"] for end in ("from", "to")] == [9, 11]
    assert [(one["table"], one["key"], one["row"]["state"]) for one in found["made"]] == [
        ("jobs", [REFUSED], "failed")
    ]
    assert [(one["table"], one["key"]) for one in found["changed"]] == [
        ("models", [MODEL]),
        ("usage", ["default", "2023-11-14"]),
    ]
    assert found["changed"][0]["columns"] == {
        "next_seq": {"old": 2, "new": 3},
        "last_request_at": {"old": BEGAN + 10, "new": BEGAN + 20},
    }
    assert found["gone"] == []
    lines = replay("--diff", "9", "11").splitlines()
    assert lines[2] == "1 made, 2 changed, 0 gone"
    assert f"~ models {MODEL}" in lines
    assert "    next_seq: 2 -> 3" in lines
    assert f"+ jobs {REFUSED}" in lines


def test_a_difference_backwards_is_the_way_back(replay, replay_json):
    found = replay_json("--diff", "11", "9")
    assert found["made"] == []
    assert [(one["key"], one["row"]["state"]) for one in found["gone"]] == [([REFUSED], "failed")]
    assert found["changed"][0]["columns"]["next_seq"] == {"old": 3, "new": 2}
    assert f"- jobs {REFUSED}" in replay("--diff", "11", "9").splitlines()


def test_a_difference_can_be_of_a_job_alone(replay_json):
    found = replay_json("--diff", "7", "end", "--job", TRAINED)
    assert [one["key"] for one in found["changed"]] == [[TRAINED]]
    assert found["changed"][0]["columns"]["state"] == {"old": "accepted", "new": "done"}
    assert (found["made"], found["gone"]) == ([], [])
    assert replay_json("--diff", "7", "end", "--job", TRAINED, "--table", "models")["changed"] == []


def test_numbers_that_differ_in_a_bit_do_not_look_the_same(replay, home):
    kind = "JSONB" if home.database_url else "TEXT"
    data = f"CAST(replace(CAST(data AS TEXT), '2.5', '0.30000000000000004') AS {kind})"
    alter(home, f"UPDATE events SET data = {data} WHERE seq = 9")
    assert "    loss_sum: - -> 0.30000000000000004" in replay("--diff", "8", "9").splitlines()


# -- step by step -----------------------------------------------------------------------------------


def test_a_step_tells_the_event_and_what_it_changes(step):
    told = step("", options=["--from", "10"])
    assert told[0] == f"11  {printing.instant(BEGAN + 20)}  job_failed"
    assert f"job_id={REFUSED}" in told[1]
    assert told[2] == "    category=user  error=learning_rate cannot be negative [bold]  seq_id=2"
    assert told[3:5] == [f"    ~ models {MODEL}", "        next_seq: 2 -> 3"]
    assert "        state: accepted -> failed" in told


def _seqs(told):
    return [int(found[1]) for line in told if (found := re.match(r"(\d+)  \d{4}-", line))]


def test_a_walk_goes_through_every_event_to_the_end(step):
    told = step("n 5", "n", "", "n 99")
    assert _seqs(told) == list(range(1, LAST + 1))
    assert told[-1] == f"the end: there is no event behind {LAST}"


def test_it_goes_on_to_the_next_breakpoint(step):
    breaks = ["--break", "kind=job_failed", f"job={TRAINED}"]
    assert _seqs(step("c", "c", "c", "c", options=breaks)) == [7, 8, 9, 11]
    assert step(*"ccccc", options=breaks)[-1] == f"the end: there is no event behind {LAST}"
    assert _seqs(step("c", "c", options=["--from", "8", *breaks])) == [9, 11]


def test_breakpoints_come_and_go(step):
    told = step("b", "b kind=job_done", f"b model={MODEL}", "d 1", "b", "c")
    assert told[:6] == [
        "no breakpoints",
        "1  kind=job_done",
        "1  kind=job_done",
        f"2  model={MODEL}",
        f"1  model={MODEL}",
        f"3  {printing.instant(BEGAN)}  job_accepted",
    ]


def test_rows_are_printed_as_they_are_there(step):
    told = step("p jobs", "p models", "n 3", f"p models {MODEL}", "p jobs", options=["--from", "2"])
    assert told[:2] == ["jobs: 0", "models: 0"]
    assert "  state: creating" in told
    assert "  next_seq: 1" in told
    assert "  source: -" in told
    assert "jobs: 1" in told


def test_it_goes_to_any_point_and_back(step):
    told = step("g end", "g 3", "p jobs", "n", f"g @{BEGAN + 12}", "n")
    assert told[:2] == [
        f"behind event 17 of 17, {printing.instant(BEGAN + 100)}",
        f"behind event 3 of 17, {printing.instant(BEGAN)}",
    ]
    assert "jobs: 1" in told
    assert f"behind event 8 of 17, {printing.instant(BEGAN + 12)}" in told
    assert _seqs(told) == [4, 9]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("x", "there is no command 'x': h lists them"),
        ("n 0", "'0' must be a whole number, 1 or more"),
        ("n many", "'many' must be a whole number, 1 or more"),
        ("b kind=x", "'x' is no kind of event: adapter_deleted, "),
        ("b model", "'model' is no breakpoint: "),
        ("d", "d takes the number of a breakpoint: b lists them"),
        ("d 1", "d takes the number of a breakpoint: b lists them"),
        ("p", "p takes a table: incarnations, "),
        ("p bodies", "p takes a table: incarnations, "),
        ("p jobs x", "jobs has no row 'x' here"),
        ("g", "g takes a point: "),
        ("g 0", "there is no event 0 in this journal: it has events 1 to 17, "),
        ("g soon", "'soon' is no point of a journal: "),
    ],
)
def test_what_is_wrong_in_a_command_is_a_line_and_it_goes_on(step, line, told):
    first, *rest = step(line, "n")
    assert first.startswith(told)
    assert _seqs(rest) == [1]


def test_help_names_every_command(step):
    told = step("h")
    assert {line.split()[0].rstrip(",") for line in told} == {"Enter", *"cbdpghq"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_only_a_terminal_is_prompted(replay, monkeypatch):
    for kind, prompts in ((Terminal, 3), (io.StringIO, 0)):
        monkeypatch.setattr(sys, "stdin", kind("n\nn\n"))
        out = replay("--step")
        assert out.count("> ") - out.count("-> ") == prompts
        assert out.endswith("\n")


def test_quit_ends_it_and_so_does_ctrl_c(replay, step, monkeypatch):
    assert step("q", "n") == []

    def interrupted(walk, breakpoints):
        raise KeyboardInterrupt

    monkeypatch.setattr(Walk, "run", interrupted)
    assert _seqs(step("n", "c", "n")) == [1]


# -- what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["0", "18", "@1", "@1700000200", "2001-01-01", "9999-12-31T00:00"])
def test_a_point_outside_is_one_line_with_the_range(refused, point):
    told = refused("--at", point)
    assert (
        f"it has events 1 to {LAST}, {printing.instant(BEGAN)} to {printing.instant(BEGAN + 100)}" in told
    )
    assert refused("--diff", "1", point) == told
    assert refused("--step", "--from", point) == told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--at", "soon"], "'soon' is no point of a journal"),
        (["--model", "x"], "there is no model 'x' behind event 17"),
        (["--job", "x", "--at", "3"], "there is no job 'x' behind event 3"),
        (["--job", "x", "--diff", "3", "2"], "there is no job 'x' behind event 3"),
        (["--from", "1"], "--from and --break are for --step"),
        (["--break", "kind=job_done"], "--from and --break are for --step"),
        (["--step", "--break", "kind=x"], "'x' is no kind of event"),
        (["--step", "--model", MODEL], "--step takes --from and --break, not --model"),
        (["--step", "--max-rows", "1"], "--step takes --from and --break, not --max-rows"),
        (["--diff", "1", "2", "--max-rows", "1"], "--max-rows is for a state in tables"),
        (["--format", "json", "--max-rows", "1"], "--max-rows is for a state in tables"),
    ],
)
def test_what_cannot_be_is_one_line(refused, options, told):
    assert told in refused(*options)


def test_two_questions_at_once_are_refused(tink, home):
    code, _, err = tink("replay", "state", "--home", home.root, "--at", "1", "--step")
    assert code == 2
    assert "not allowed with" in err


def test_a_journal_without_events_says_so(tink, tmp_path):
    empty = Home(tmp_path / "empty")
    empty.make()
    prepare(empty)
    assert tink("replay", "state", "--home", empty.root) == (
        2,
        "",
        f"tink replay: {empty.root} has no events yet\n",
    )


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("DELETE FROM events WHERE seq = 5", "the journal has no event 5"),
        ("UPDATE events SET data = '\"{\"' WHERE seq = 5", "event 5 is not one that this Tink can read"),
        ("UPDATE events SET kind = 'party' WHERE seq = 5", "event 5 is not one that this Tink can read"),
        ("UPDATE events SET job_id = 'x' WHERE seq = 5", "jobs has no open row"),
    ],
)
def test_a_damaged_journal_is_one_line(refused, home, monkeypatch, damage, told):
    alter(home, damage)
    for options in (["--at", "6"], ["--diff", "2", "6"], ["--step", "--from", "6"]):
        assert told in refused(*options)
        assert "'tink db check' tells more" in refused(*options)


def test_it_changes_nothing_and_prints_no_prompt_of_a_user(replay, home, tmp_path, monkeypatch):
    before = files(home.root)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n 99\np jobs\ng 1\nc\n"))
    told = replay("--step") + replay() + replay("--format", "json") + replay("--diff", "1", "end")
    assert SECRET not in told
    assert files(home.root) == before
