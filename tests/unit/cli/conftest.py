from __future__ import annotations

import json

import pytest
from cli_home import BEGAN, StillWorld, write

from tests.unit.journal.journal_kit import copy_of
from tink.cli import jobs, status
from tink.cli.main import main
from tink.doctor import processes


@pytest.fixture
def home(on_database, tmp_path):
    """Of a worker that stopped, to be changed at will."""
    return copy_of(write, tmp_path / "home")


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    """Nobody answers, no process runs, and it is 200 s after the journal began."""
    monkeypatch.setattr(StillWorld, "time", BEGAN + 200)
    monkeypatch.setattr(StillWorld, "answer", None)
    monkeypatch.setattr(status, "World", StillWorld)
    monkeypatch.setattr(jobs, "World", StillWorld)
    monkeypatch.setattr(processes, "alive", lambda pid, word: False)
    monkeypatch.delenv("TINK_HOME", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def tink(capsys):
    """Runs a command: (exit status, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def tink_json(tink):
    """Runs a command that must print one JSON document: (exit status, document)."""

    def run(*arguments):
        code, out, err = tink(*arguments, "--json")
        assert err == ""
        return code, json.loads(out)

    return run
