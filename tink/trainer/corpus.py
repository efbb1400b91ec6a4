"""Text that every Python has: the docstrings of its standard library.

A function of the Python version alone: the same modules in the same order, whatever the machine.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Modules with much prose and few tables. Missing ones are skipped: a Python may lack some.
# fmt: off
MODULES = (
    "abc", "argparse", "ast", "bisect", "calendar", "cmd", "code", "codecs", "collections/__init__",
    "concurrent/futures/_base", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "difflib", "dis", "doctest", "email/message", "enum", "filecmp", "fileinput",
    "fnmatch", "fractions", "ftplib", "functools", "getopt", "gettext", "glob", "graphlib", "gzip",
    "hashlib", "heapq", "hmac", "html/parser", "http/client", "http/cookiejar", "http/cookies",
    "http/server", "imaplib", "inspect", "io", "_pyio", "ipaddress", "json/__init__",
    "json/decoder", "json/encoder", "linecache", "locale", "logging/__init__", "logging/config",
    "logging/handlers", "lzma", "mailbox", "mimetypes", "multiprocessing/pool", "numbers",
    "operator", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "platform",
    "plistlib", "poplib", "pprint", "profile", "pstats", "queue", "random", "reprlib", "sched",
    "secrets", "selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "trace", "traceback", "turtle", "types", "typing", "unittest/case", "unittest/mock",
    "unittest/suite", "urllib/parse", "urllib/request", "uuid", "warnings", "weakref", "webbrowser",
    "xml/dom/minidom", "xml/etree/ElementTree", "xmlrpc/client", "zipfile",
)
# fmt: on


@dataclass(frozen=True)
class Docstring:
    """`name` is the module's, or `module.thing`."""

    name: str
    text: str

    @property
    def is_prose(self) -> bool:
        """Short, and hardly anything but words: what a tiny model can learn to write."""
        words = sum(letter.isalpha() or letter in " \n.,'" for letter in self.text)
        return len(self.text) < 400 and words > 0.96 * len(self.text)


# For a Python whose standard library comes without sources.
FALLBACK = Docstring("tink", "A model learns from examples. Each one makes the next guess better.\n")


def docstrings() -> list[Docstring]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [doc for module in MODULES for doc in _of_module(root / f"{module}.py", module)]
    return found or [FALLBACK] * 100


def _of_module(path: Path, module: str) -> Iterator[Docstring]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        return
    prefix = module.replace("/__init__", "").replace("/", ".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            # One-liners teach little but their own shape.
            if text and len(text) > 60 and text.isascii():
                name = prefix if isinstance(node, ast.Module) else f"{prefix}.{node.name}"
                yield Docstring(name, inspect.cleandoc(text) + "\n")
