"""The help is worth reading: every command, every option, with examples and exit statuses."""

from __future__ import annotations

import argparse
import importlib.util
import socket

import pytest

import tink as package
from tink.audit.questions import QUESTIONS
from tink.cli.main import COMMANDS, parser
from tink.cli.replay import MODES
from tink.trainer import engines, process
from tink.trainer.options import Options


def subcommands(of, prefix=()):
    """(words, parser) of every command, nested ones too."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield (*prefix, name), command
                yield from subcommands(command, (*prefix, name))


EVERY = dict(subcommands(parser()))


def test_the_commands_are_these():
    assert set(EVERY) == {
        ("serve",),
        ("config",),
        ("doctor",),
        ("status",),
        ("jobs",),
        ("jobs", "show"),
        ("sql",),
        ("audit",),
        *(("audit", question) for question in QUESTIONS),
        ("journal",),
        ("journal", "verify"),
        ("export",),
        ("replay",),
        *(("replay", mode) for mode in MODES),
        ("db",),
        ("db", "upgrade"),
        ("db", "check"),
        ("db", "move"),
        ("db", "backup"),
        ("gc",),
        ("trainer",),
        ("vllm",),
    }


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_mentions_and_explains_every_option(tink, words):
    code, out, err = tink(*words, "--help")
    assert (code, err) == (0, "")
    for action in EVERY[words]._actions:
        assert action.help, f"{action.dest} is not explained"
        assert all(option in out for option in action.option_strings)
    assert len(EVERY[words].description) > 40
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_examples_and_exit_statuses(tink, name):
    out = tink(name, "--help")[1]
    assert "examples:\n  " in out
    assert "exit status: 0" in out


def test_help_of_tink_names_every_command(tink):
    code, out, _ = tink("--help")
    assert code == 0
    assert all(f"    {name} " in out for name in COMMANDS)
    assert "examples:" in out


def test_version(tink):
    assert tink("--version") == (0, f"tink {package.__version__}\n", "")


def test_no_command_is_an_error_that_names_them(tink):
    code, _, err = tink()
    assert code == 2
    assert "COMMAND" in err


# -- tink trainer -----------------------------------------------------------------------------------


def test_the_trainer_hands_its_options_on(tink, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(process, "run", lambda options: ran.append(options) or 0)
    options = ["--home", tmp_path, "--port", 8500, "--model", "a b", "--dtype", "bfloat16", "--slots", 2]
    assert tink("trainer", "--engine", "hf", *options)[0] == 0
    assert ran == [Options(home=tmp_path, port=8500, model="a b", dtype="bfloat16", slots=2, threads=1)]


def test_the_trainer_without_its_libraries_says_what_to_install(tink, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "torch" else found(name))
    code, out, err = tink("trainer")
    assert (code, out) == (2, "")
    assert err == "tink trainer: the engine 'hf' needs torch, not installed here: pip install 'tink[hf]'\n"


def test_the_trainer_knows_no_other_engine(tink):
    code, _, err = tink("trainer", "--engine", "abacus")
    assert code == 2
    assert "--engine" in err


def test_the_trainer_that_cannot_listen_says_so_in_one_line(tink):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert tink("trainer", "--port", port) == (
            2,
            "",
            f"tink trainer: cannot listen on 127.0.0.1, port {port}: Address already in use\n",
        )
