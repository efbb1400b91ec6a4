"""The documentation says what the code does: names, fields, defaults, endpoints, examples."""

from __future__ import annotations

import ast
import re
import sqlite3
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import tink
from tink import crash
from tink.api import rest, tinker
from tink.api.both import SDK_MEMBERS
from tink.api.rest.operations import OPERATIONS
from tink.api.tinker import TABLE as ROUTES
from tink.api.tinker import unsupported
from tink.cli import vllm
from tink.cli.main import COMMANDS
from tink.domain.events import KINDS
from tink.domain.ledger import Ledger
from tink.domain.requests import OpName
from tink.domain.rows import JobState
from tink.home import Home
from tink.journal import schema
from tink.journal.journal import prepare
from tink.metrics import Metrics
from tink.settings import Settings
from tink.trainer.server import application
from tink.trainer.trainer import Trainer
from tink.wire import tink_train
from tools import generated_docs

ROOT = Path(tink.__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
JOURNAL = (DOCS / "journal.md").read_text()
REST = (DOCS / "rest.md").read_text()
SDK = (DOCS / "sdk.md").read_text()
PROTOCOL = (DOCS / "trainer-protocol.md").read_text()

TABLES = {**schema.metadata.tables, **schema.bodies_metadata.tables}


def names(text):
    """Everything in backquotes."""
    return re.findall(r"`([^`]+)`", text)


def section(text, heading):
    """What stands below a heading, up to the next one."""
    body = text.split(f"\n{heading}\n", 1)[1]
    return re.split(r"^#", body, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text):
    """The cells of each row of the tables in `text`, without their heads."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if "---" not in line[0]][1:]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_and_column_of_the_journal_is_documented_in_order(table):
    documented = [names(row[0])[0] for row in rows(section(JOURNAL, f"### `{table}`"))]
    assert documented == [column.name for column in TABLES[table].columns]


def test_every_event_is_documented_with_its_fields():
    documented = {names(row[0])[0]: names(row[2]) for row in rows(section(JOURNAL, "## Events"))}
    kinds = {kind: list(event.__struct_fields__) for kind, event in KINDS.items()}
    assert documented == kinds


@pytest.mark.parametrize(("column", "values"), [("op", OpName), ("state", JobState)])
def test_every_value_of_a_jobs_column_is_documented(column, values):
    cells = {names(row[0])[0]: row[1] for row in rows(section(JOURNAL, "### `jobs`"))}
    assert names(cells[column]) == list(get_args(values))


@pytest.mark.parametrize("page", [README, DOCS / "journal.md"], ids=lambda page: page.name)
def test_every_query_in_the_documentation_runs(page, tmp_path):
    home = Home(tmp_path / "home")
    home.make()
    prepare(home)
    connection = sqlite3.connect(f"file:{home.journal}?mode=ro", uri=True)
    queries = re.findall(r"```sql\n(.*?)```", page.read_text(), re.DOTALL)
    assert queries
    for query in queries:
        for statement in query.split(";"):
            connection.execute(statement).fetchall()
    connection.close()


def test_every_setting_is_documented_with_its_names_and_default():
    page = (DOCS / "settings.md").read_text()
    documented = {tuple(names(row[0])): row[2] for row in rows(section(page, "## All"))}
    assert set(documented) == {field.metadata["names"] for field in fields(Settings)}
    for field in fields(Settings):
        default = str(field.default).lower() if field.type == "bool" else str(field.default)
        if field.default not in ("", None):
            assert documented[field.metadata["names"]] == f"`{default}`", field.name
    passed_on = {names(row[0])[0] for row in rows(section(page, "## What `tink vllm` starts"))}
    assert passed_on == vllm.OURS - {"VLLM_BASE_URL"}


def test_the_settings_in_the_readme_are_some_of_all():
    few = rows(section(README.read_text(), "## Settings"))
    page = (DOCS / "settings.md").read_text()
    every = [[row[0], *row[2:]] for row in rows(section(page, "## All"))]
    assert 5 <= len(few) <= 12
    assert all(row in every for row in few)


def test_what_the_code_writes_in_the_documentation_is_what_it_says():
    pages = {path: path.read_text() for path in generated_docs.PAGES}
    assert {path.name for path, text in pages.items() if generated_docs.render(text) != text} == set(), (
        "run tools/generate-docs"
    )
    for block in generated_docs.BLOCKS:
        assert any(f"<!-- generated: {block} -->" in text for text in pages.values()), block


def test_a_page_that_the_code_contradicts_is_found():
    text = (generated_docs.ROOT / "README.md").read_text()
    assert generated_docs.render(text.replace("Megatron server", "Nobody")) == text


def test_every_command_is_documented():
    text = README.read_text()
    assert all(f"tink {command}" in text for command in COMMANDS)
    assert all(
        f"tink {command}" in text
        for command in ("jobs show", "db upgrade", "db check", "db move", "db backup")
    )


def test_every_endpoint_of_the_sdk_is_documented_and_no_other():
    refused = {(method, path) for path, methods in unsupported.TABLE.items() for method in methods}
    served = {(method, path) for path, methods in ROUTES.items() for method in methods} - refused
    documented = set()
    for row in rows(section(SDK, "## Endpoints")):
        methods = []
        for method, path in re.findall(r"`([A-Z]+)(?: (/[^`]*))?`", row[0]):
            methods.append(method)
            if path:
                documented |= {(each, path) for each in methods}
                methods = []
    assert documented == served


def test_every_operation_of_the_rest_api_is_documented_and_no_other():
    documented = {name for row in rows(section(REST, "## Two forms")) for name in names(row[0])}
    served = {path for path in rest.SHORT if not path.endswith("_async") and path != "/asample"}
    without_form = {"/retrieve_future", "/get_server_capabilities", "/list_loss_functions"}
    assert {f"/{name.removeprefix('/')}" for name in documented} == served - without_form
    assert all(f" {path}" in REST for path in without_form)
    for row in rows(section(REST, "## Two forms")):
        for name in names(row[0]):
            operation = OPERATIONS[name.removeprefix("/")]
            assert {*operation.form.__struct_fields__} <= {*names(row[1])}, name
            assert [*operation.answer.__struct_fields__] == names(row[2]), name
    shared = section(REST, "## Beside the SDK")
    assert {path.removeprefix("/") for path in tinker.TABLE.keys() & rest.API.keys()} <= {*names(shared)}
    assert {*names(shared)} >= SDK_MEMBERS


def test_every_operation_of_the_training_protocol_is_documented_with_its_fields():
    documented = {names(row[0])[0]: names(row[1]) for row in rows(section(PROTOCOL, "## Operations"))}
    operations = {op.__struct_config__.tag: list(op.__struct_fields__) for op in get_args(tink_train.Op)}
    assert documented == operations


def test_every_field_of_the_training_protocol_is_named():
    named = set(names(PROTOCOL))
    for message in (
        tink_train.OpRequest,
        tink_train.OpResult,
        tink_train.OpReply,
        tink_train.SampleRequest,
        tink_train.SampleReply,
        tink_train.SnapshotRequest,
        tink_train.Refusal,
    ):
        assert set(message.__struct_fields__) <= named, message


async def test_every_call_of_the_training_protocol_is_documented_and_no_other(nursery):
    app = application(Trainer(tink.world.World(), 1, nursery))
    served = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    documented = {
        tuple(names(row[0])[0].partition("?")[0].split(" "))
        for row in rows(section(PROTOCOL, "## Transport"))
    }
    assert documented == served


def test_every_refusal_of_the_training_protocol_is_documented():
    words = re.findall(r"\| (\d{3}) `(\w+)`", tink_train.__doc__)
    assert len(words) == 7
    assert all(f"{status} `{word}`" in PROTOCOL for status, word in words)


def test_every_crash_point_is_documented():
    documented = {
        names(row[0])[0]: row[1]
        for row in rows(section((DOCS / "recovery.md").read_text(), "## Crash points"))
    }
    assert documented == crash.POINTS


def test_every_metric_is_documented_with_its_labels():
    documented = {names(row[0])[0]: names(row[1]) for row in rows((DOCS / "metrics.md").read_text())}
    metrics = Metrics(Ledger(), 0)
    families = [family for family in metrics.registry.collect() if family.name.startswith("tink_")]
    totals = {family.name + "_total" * (family.type == "counter") for family in families}
    assert documented.keys() == totals
    for name, collector in metrics.registry._names_to_collectors.items():
        if name in documented:
            assert documented[name] == list(getattr(collector, "_labelnames", documented[name]))


def test_every_dependency_is_justified():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (DOCS / "decisions" / "0001-dependencies.md").read_text()
    groups = {"## Runtime": project["dependencies"]}
    extras = project["optional-dependencies"]
    titles = {
        extra: next(t for t in re.findall(r"^## .*", text, re.M) if f"`{extra}`" in t) for extra in extras
    }
    groups |= {titles[extra]: needed for extra, needed in extras.items()}
    for title, needed in groups.items():
        justified = {names(row[0])[0] for row in rows(section(text, title))}
        assert {re.split(r"[<>=\[]", name)[0] for name in needed} == justified, title


def test_every_decision_is_in_the_list():
    listed = re.findall(r"\]\((.*?)\)", (DOCS / "decisions" / "README.md").read_text())
    pages = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    assert listed == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_example_in_the_readme_is_python():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    ast.parse(example)


def test_the_changelog_has_this_version():
    assert f"## [{tink.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
