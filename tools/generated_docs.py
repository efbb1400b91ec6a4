"""The parts of the documentation that the code writes: what stands between `<!-- generated: NAME -->` and
`<!-- end -->`. `tools/generate-docs` runs it; a test holds the pages to it."""

from __future__ import annotations

import argparse
import re
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import Field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

from tink.audit.questions import QUESTIONS
from tink.cli.vllm import command, environment
from tink.domain.routing import HOW_TO_SAMPLE, HOW_TO_TRAIN, NO_SAMPLING, NO_TRAINING, NO_VLLM
from tink.errors import BackendError, NotServed
from tink.journal.schema import metadata
from tink.journal.views import VIEWS, definitions
from tink.settings import Settings, Switch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BACKENDS = {"vllm": "vLLM", "megatron": "Megatron server", "hf": "HuggingFace engine"}


def _table(*rows: Iterable[str]) -> str:
    """Markdown; the first row is the head."""
    head, *body = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *body])


def _served(backend: str | None, refusal: str) -> str:
    return _BACKENDS[backend] if backend is not None else f"{NotServed.status} `{refusal}`"


def routing() -> str:
    """Each cell as the settings resolve it."""

    def cells(megatron: bool, vllm: bool, hf: Switch) -> tuple[str, ...]:
        routes = Settings(use_megatron=megatron, use_vllm=vllm, use_hf=hf).routes
        return _served(routes.sampling, NO_SAMPLING), _served(routes.training, NO_TRAINING)

    rows: list[tuple[str, ...]] = [("`USE_MEGATRON`", "`USE_VLLM`", "`USE_HF`", "`sample`", "all others")]
    for megatron, vllm in product((True, False), repeat=2):
        by_cells = defaultdict[tuple[str, ...], list[str]](list)
        for hf in get_args(Switch):
            by_cells[cells(megatron, vllm, hf)].append(f"`{hf}`")
        for served, switches in by_cells.items():
            where = "any" if len(by_cells) == 1 else ", ".join(switches)
            rows.append((f"`{megatron}`".lower(), f"`{vllm}`".lower(), where, *served))
    return _table(*rows)


def refusals() -> str:
    return _table(
        ("status", "`detail`", "what to do"),
        (str(NotServed.status), f"`{NO_SAMPLING}`", HOW_TO_SAMPLE),
        (str(NotServed.status), f"`{NO_TRAINING}`", HOW_TO_TRAIN),
        (
            str(BackendError.status),
            f"`{NO_VLLM} for ...`",
            "as the text goes on: the URLs, why, and the remedy",
        ),
    )


# Of a type of the settings, what is written.
_KINDS = {
    "str": "text",
    "int": "whole number",
    "int | None": "whole number",
    "float": "number",
    "float | None": "number",
    "bool": "true, false",
    "Switch": ", ".join(get_args(Switch)),
    "Path": "path",
    "Path | None": "path",
}

# What a newcomer needs.
_FEW = frozenset(
    [
        "TINK_HOST",
        "TINK_PORT",
        "TINK_HOME",
        "TINK_DATABASE_URL",
        "TINK_API_KEYS",
        "TINK_HF_MODEL",
        "TINK_RETENTION_HOURS",
        "MAX_WORKERS",
        "USE_MEGATRON",
        "MEGATRON_SERVER_URL",
        "USE_VLLM",
        "VLLM_BASE_URL",
    ]
)


def _names(field: Field[Any]) -> str:
    return ", ".join(f"`{name}`" for name in field.metadata["names"])


def _default(field: Field[Any]) -> str:
    if field.default in ("", None):
        return str(field.metadata["otherwise"])
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def settings() -> str:
    """All, in the order of `tink config`."""
    rows = [
        (
            _names(field),
            "secret" if field.metadata["secret"] else _KINDS[str(field.type)],
            _default(field),
            field.metadata["help"],
        )
        for field in fields(Settings)
    ]
    return _table(("variable", "value", "default", "what it does"), *rows)


def few_settings() -> str:
    rows = [
        (_names(field), _default(field), field.metadata["help"])
        for field in fields(Settings)
        if field.metadata["names"][0] in _FEW
    ]
    return _table(("variable", "default", "what it does"), *rows)


def vllm_start() -> str:
    """What `tink vllm` has in its command that it has not without the variable, or the other way round."""
    usual = Settings(hf_model="MODEL")
    rows: list[tuple[str, ...]] = [("variable", "default", "for example", "what `tink vllm` starts")]
    for name, value in VLLM_START.items():
        set_to = Settings.read({name: value}).settings
        (field,) = (one for one in fields(Settings) if name in one.metadata["names"])
        changed = replace(usual, **{field.name: getattr(set_to, field.name)})
        words, before = _pairs(changed), _pairs(usual)
        added, gone = (
            [word for word in one if word not in other] for one, other in ((words, before), (before, words))
        )
        started = f"`{' '.join(added)}`" if added else f"no `{gone[0]}`"
        rows.append((f"`{name}`", _default(field), f"`{value}`", started))
    return _table(*rows)


# Of each an example that is not its default.
VLLM_START = {
    "VLLM_HOST": "0.0.0.0",
    "VLLM_PORT": "8001",
    "VLLM_GROUP_PORT": "9100",
    "VLLM_GPU_MEMORY_UTIL": "0.5",
    "VLLM_ENABLE_LORA": "false",
    "VLLM_MAX_LORAS": "8",
    "VLLM_MAX_LORA_RANK": "128",
}


def _pairs(settings: Settings) -> list[str]:
    """Of the command line: an option with its value is one, and so is a variable of vLLM's own."""
    variables = [f"{name}={value}" for name, value in environment(settings, {}).items()]
    options = re.findall(r"--\S+(?: (?!--)\S+)?", " ".join(command(settings)))
    return [*variables, *options]


def views() -> str:
    """Each with its columns, as SQLite names them."""
    database = sqlite3.connect(":memory:")
    for statement in definitions("sqlite").values():
        database.execute(statement)
    for table in metadata.sorted_tables:
        database.execute(str(CreateTable(table).compile(dialect=sqlite.dialect())))
    rows = [("view", "one row for each", "columns")]
    for name, help_ in VIEWS.items():
        columns = database.execute(f"SELECT * FROM {name}").description
        rows.append((f"`{name}`", help_, ", ".join(f"`{column[0]}`" for column in columns)))
    database.close()
    return _table(*rows)


def questions() -> str:
    rows = [("command", "what it answers")]
    for name, question in QUESTIONS.items():
        words = [
            f"[--{p.name} N]" if p.default is not None else p.name.upper() for p in question.parameters
        ]
        rows.append((f"`{' '.join(['tink audit', name, *words])}`", question.help))
    return _table(*rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "routing": routing,
    "refusals": refusals,
    "settings": settings,
    "few_settings": few_settings,
    "vllm_start": vllm_start,
    "views": views,
    "questions": questions,
}


def render(page: str) -> str:
    """The page with its blocks as the code has them now. KeyError for a block that nothing writes."""
    return re.sub(
        r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
        lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> int:
    """Exit status 1 if --check finds a page that would be changed."""
    parser = argparse.ArgumentParser(prog="tools/generate-docs", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, and fail if something would be"
    )
    check = parser.parse_args().check
    stale = {path: new for path in PAGES if (new := render(old := path.read_text())) != old}
    for path, text in stale.items():
        print(path.relative_to(ROOT), "is not what the code says" if check else "written")
        if not check:
            path.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
