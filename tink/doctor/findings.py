"""What a check finds."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "warning", "wrong"]


class Finding(msgspec.Struct, frozen=True):
    """Of one thing (`check`), in one line. `warning`: it works, and not as one may think. `remedy`: what to
    do, a command where there is one; empty where all is well, or the detail has it already."""

    check: str
    state: State
    detail: str
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    return Finding(check, "ok", detail)


def warning(check: str, detail: str, remedy: str = "") -> Finding:
    return Finding(check, "warning", detail, remedy)


def wrong(check: str, detail: str, remedy: str = "") -> Finding:
    return Finding(check, "wrong", detail, remedy)
