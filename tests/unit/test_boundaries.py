"""What the source itself promises: which part may know which, and that the outside comes in by one door."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import tink

ROOT = Path(tink.__file__).parent
MODULES = {
    ".".join(("tink", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if not path.name.endswith("_pb2.py")
}

# part -> the parts that it may import beside itself. Every part is named here, so a new one must choose.
BASE = frozenset({"addresses", "crash", "errors", "files", "limits", "logs", "manifest", "wire", "tink"})
ALLOWED: dict[str, frozenset[str]] = {
    "tink": frozenset(),
    "addresses": frozenset(),
    "crash": frozenset({"tink", "errors"}),
    "errors": frozenset(),
    "files": frozenset(),
    "http_server": frozenset({"limits"}),
    "limits": frozenset(),
    "logs": frozenset(),
    "manifest": frozenset({"errors", "wire"}),
    "pretrained": frozenset({"errors", "home", "limits"}),
    "transport": frozenset({"limits"}),
    "wire": frozenset(),
    # Below the settings, which have paths in it, and the trainer, whose home is the worker's.
    "home": frozenset({"errors", "files", "wire"}),
    "domain": BASE,
    "world": BASE | {"transport"},
    "metrics": BASE | {"domain"},
    "settings": BASE | {"domain", "home"},
    "journal": BASE | {"domain", "home", "world"},
    "backends": BASE | {"domain", "pretrained", "world"},
    "actors": BASE | {"domain", "home", "world", "settings", "journal", "backends", "metrics"},
    "api": BASE | {"domain", "pretrained", "world"},
    "trainer": BASE | {"domain", "home", "http_server", "pretrained", "world"},
    "doctor": BASE
    | {"domain", "home", "pretrained", "world", "settings", "journal", "backends", "trainer"},
    "audit": frozenset({"errors"}),
    "replay": BASE
    | {"domain", "home", "world", "settings", "journal", "backends", "actors", "pretrained", "metrics"},
    "cli": BASE
    | {"domain", "home", "pretrained", "world", "settings", "journal", "backends", "actors", "api"}
    | {"audit", "doctor", "http_server", "replay", "trainer"},
}


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _imports(module: str) -> Iterator[str]:
    """Full names of all that a module imports, at its top or later."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES or _is_generated(full) else base


def _is_generated(name: str) -> bool:
    return name.endswith("_pb2")


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_part_has_its_place_in_the_layers() -> None:
    assert {_part(module) for module in MODULES} == set(ALLOWED)


def test_a_module_imports_only_the_layers_below_it() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module in MODULES
        for imported in _imports(module)
        if imported.split(".")[0] == "tink"
        and _part(imported) not in ALLOWED[_part(module)] | {_part(module)}
    ]
    assert wrong == []


def test_every_part_needs_the_layers_that_it_may_import() -> None:
    used = {part: set[str]() for part in ALLOWED}
    for module in MODULES:
        used[_part(module)].update(map(_part, _imports(module)))
    unneeded = {part: may - BASE - used[part] for part, may in ALLOWED.items()}
    assert not any(unneeded.values()), unneeded


def test_nothing_imports_the_command_line() -> None:
    assert [m for m in MODULES if _part(m) != "cli" and any(_part(i) == "cli" for i in _imports(m))] == []


def test_only_the_trainer_knows_the_tensor_libraries() -> None:
    heavy = {"torch", "transformers", "tokenizers", "safetensors", "peft", "numpy"}
    known = {m: heavy & {name.split(".")[0] for name in _imports(m)} for m in MODULES}
    assert known.pop("tink.pretrained") == {"tokenizers"}
    assert {_part(module) for module in known if known[module]} == {"trainer"}


# -- the world seam ---------------------------------------------------------------------------------

DOORS = re.compile(
    r"time\.(time|monotonic|perf_counter|sleep)(_ns)?|random\..*|uuid\..*|secrets\..*"
    r"|(datetime\.)?(datetime|date)\.(now|utcnow|today)|trio\.to_thread\..*|threading\..*|asyncio\..*"
    r"|concurrent\..*|os\.urandom|numpy\.random\..*"
)
# (module, name): why it may.
SEAM = {
    # The installation's secret, made once, before there is a world: nothing simulated depends on it.
    ("tink.home", "os.urandom"),
}


def _names(module: str) -> Iterator[str]:
    """Dotted names used in a module, with imported names written out in full."""
    tree = _tree(module)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                aliases[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            text = ast.unparse(node)
            head, dot, rest = text.partition(".")
            if head in aliases and re.fullmatch(r"[\w.]+", text):
                yield aliases[head] + dot + rest


def test_clock_chance_and_threads_come_in_through_the_world_alone() -> None:
    used = {(m, name) for m in MODULES for name in _names(m) if DOORS.fullmatch(name)}
    # The HTTP server is outside, as its clients are.
    outside = ("tink.world", "tink.http_server")
    assert {use for use in used if use[0] not in outside} == SEAM


def test_the_seam_test_sees_what_it_should() -> None:
    seen = {name for name in _names("tink.world") if DOORS.fullmatch(name)}
    assert {"time.time", "time.monotonic", "uuid.uuid4", "trio.to_thread.run_sync"} <= seen


# -- the worker needs no torch ----------------------------------------------------------------------

BLOCKED = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "safetensors", "peft"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_everything_but_the_engines_imports_without_torch() -> None:
    # Of the trainer: its server and all that is not tensors. The engines come in when one is built.
    light = {"process", "options", "build", "server", "trainer", "lanes", "books", "preload", "samples"}
    light |= {"boundary", "text_generation"}
    modules = [m for m in MODULES if _part(m) != "trainer" or m.removeprefix("tink.trainer.") in light]
    assert "tink.cli.main" in modules
    assert len([m for m in modules if _part(m) == "trainer"]) == len(light)
    subprocess.run([sys.executable, "-c", BLOCKED, *modules], check=True)


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert {name for name in listed if not name.startswith("tink.migrations")} == packages


# -- limits -----------------------------------------------------------------------------------------

# Numbers that are parts of a format or of arithmetic, or say how something is printed.
NO_LIMITS = {
    "MAX_INT", "MAX_PROTO_SEQ", "SEEDS", "NO_TOKEN", "NO_LOGPROB", "NEVER", "UNKNOWN_CONTEXT",
    "MAX_TEMPERATURE", "PROBE", "PROBE_TOP", "PROBED", "SECRET_BYTES", "PIPE_COLUMNS", "LIST_COLUMNS",
    "_UNITS", "SHOWN", "BUCKET", "BLOCK", "PRETRAIN_STEPS", "SEQUENCE", "SEQUENCES", "LEARNING_RATE",
    "THREADS", "DYNAMIC_CONFIG", "MAX_PROMPTS", "MAX_TOP_K", "DEFAULT_TOKENS", "START", "_DAYS",
    "NONE", "EXACT", "LOCK",
}  # fmt: skip


def _has_number(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Constant) and type(n.value) in (int, float) for n in ast.walk(node))


def _is_batch(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "yield_per"


def test_every_limit_is_in_limits() -> None:
    found, spared = set(), set()
    for module in MODULES.keys() - {"tink.limits"}:
        for node in _tree(module).body:
            if isinstance(node, ast.Assign) and _has_number(node.value):
                targets = [name for target in node.targets for name in ast.walk(target)]
                names = {name.id for name in targets if isinstance(name, ast.Name) and name.id.isupper()}
                found |= {f"{module}: {name}" for name in names - NO_LIMITS}
                spared |= names & NO_LIMITS
        waits = re.compile(r"\b(sleep|move_on_after|fail_after)$")
        for node in ast.walk(_tree(module)):
            if isinstance(node, ast.Call) and waits.search(ast.unparse(node.func)):
                given = [arg for arg in node.args if isinstance(arg, ast.Constant)]
                found |= {f"{module}: {ast.unparse(node)}" for arg in given if _has_number(arg)}
            elif isinstance(node, ast.Dict):  # SQLAlchemy's option, among others
                given = [value for key, value in zip(node.keys, node.values, strict=True) if _is_batch(key)]
                found |= {f"{module}: {ast.unparse(node)}" for value in given if _has_number(value)}
    assert found == set()
    assert spared == NO_LIMITS


def test_no_limit_is_set_twice() -> None:
    """The second of one name would silently be the first one's too."""
    names = [node.targets[0] for node in _tree("tink.limits").body if isinstance(node, ast.Assign)]
    found = [ast.unparse(name) for name in names]
    assert len(found) > 50
    assert len(found) == len(set(found))


# -- size and leftovers -----------------------------------------------------------------------------


def test_a_module_is_short_and_finished() -> None:
    leftovers = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    texts = {module: path.read_text() for module, path in MODULES.items()}
    assert {m for m, text in texts.items() if text.count("\n") > 600} == set()
    assert {m for m, text in texts.items() if leftovers.search(text)} == set()
    assert len(texts) > 50
