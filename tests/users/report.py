"""What is said in the end, and what is wrong."""

from __future__ import annotations

from typing import Any

from tests.users.trial import FAIR, Trial, p95
from tink.cli import printing


def problems(found: Trial, at_least: float | None = None, fair: bool = False) -> list[str]:
    """A line each. `at_least`: times as fast as one after another."""
    lines = [
        f"user {outcome.user}: {outcome.error}"
        for outcome in (*found.alone, *found.together)
        if outcome.error is not None
    ]
    lines += [
        f"user {outcome.user} got other numbers than alone"
        for outcome, same in zip(found.together, found.identical, strict=True)
        if not same and outcome.error is None
    ]
    if at_least is not None and not found.speedup >= at_least:
        lines.append(f"{found.speedup:.2f} times as fast is less than {at_least:g}")
    if fair and (found.unfairness is None or found.unfairness > FAIR):
        lines.append(
            "the p95 of what a user's steps waited is "
            + ("not known" if found.unfairness is None else f"{found.unfairness:.2f} times the mean")
        )
    return lines


def document(found: Trial) -> dict[str, Any]:
    waits: list[list[float]] | list[None] = found.waits or [None] * len(found.together)
    return {
        "users": [
            {
                "user": alone.user,
                "losses": together.losses,
                "alone_seconds": alone.seconds,
                "together_seconds": together.seconds,
                "step_waits_ms": waited,
                "identical": same,
                "error": alone.error or together.error,
            }
            for alone, together, same, waited in zip(
                found.alone, found.together, found.identical, waits, strict=True
            )
        ],
        "alone_seconds": found.alone_seconds,
        "together_seconds": found.together_seconds,
        "speedup": found.speedup,
        "unfairness": found.unfairness,
        "most_running": found.most_running,
    }


def show(found: Trial) -> None:
    columns = ("USER", "LOSS", "ALONE", "AT ONCE", "STEP WAITS", "P95", "AS ALONE")
    table = printing.table(*columns, right=("ALONE", "AT ONCE", "STEP WAITS", "P95"))
    said = document(found)
    for user in said["users"]:
        losses, waited = user["losses"], user["step_waits_ms"]
        table.add_row(
            str(user["user"]),
            f"{losses[0]:.1f} -> {losses[-1]:.1f}" if losses else "-",
            printing.duration(user["alone_seconds"] or None),
            printing.duration(user["together_seconds"] or None),
            printing.duration(sum(waited) / len(waited) / 1000 if waited else None),
            printing.duration(p95(waited) / 1000 if waited else None),
            "failed" if user["error"] else "yes" if user["identical"] else "no",
        )
    printing.console().print(table)
    users = len(found.together)
    print(f"\n{found.succeeded} of {users} users succeeded, {sum(found.identical)} got what they got alone")
    print(
        f"one after another {found.alone_seconds:.1f} s, at once {found.together_seconds:.1f} s: "
        f"{found.speedup:.2f} times as fast"
    )
    if found.most_running is not None:
        print(f"training jobs that ran at one time: {found.most_running}")
    # Where everyone has a slot of their own the waits are the worker's own milliseconds.
    if found.most_running == 1 and found.unfairness is not None:
        print(
            f"the longest p95 of what a user's steps waited is {found.unfairness:.2f} times the mean of all"
        )
