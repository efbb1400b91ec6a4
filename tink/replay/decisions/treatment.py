"""What a replay does with each kind of event."""

from __future__ import annotations

from enum import Enum

from tink.domain import events
from tink.domain.events import AnyEvent


class Treatment(Enum):
    ASKED = "a client's question is put to the Router once more, and its event is compared"
    MADE = "the actors make it once more, of what the servers answered, and it is compared"
    GIVEN = "what happened to the worker happens to it once more"
    LEFT_OUT = "it is not made again; the state that it left is taken as it is"


ASKED, MADE, GIVEN, LEFT_OUT = Treatment

# Each kind, and why.
TREATMENTS: dict[type[AnyEvent], tuple[Treatment, str]] = {
    events.IncarnationStarted: (
        GIVEN,
        "the worker before it ends here, and this one begins with the state",
    ),
    events.IncarnationStopped: (LEFT_OUT, "who stops a worker, and when, is not its own decision"),
    events.TrainerStarted: (GIVEN, "what is served, and by whom, is the environment's"),
    events.SessionCreated: (ASKED, "its id comes from chance, and is the recorded one"),
    events.SessionFinished: (ASKED, "its client says so"),
    events.SessionMoved: (ASKED, "its client says so"),
    events.ClientFailed: (ASKED, "its client says so"),
    events.JobAccepted: (ASKED, "numbers, ids and what is kept of the request are decided"),
    events.JobStarted: (MADE, "validation, order, op_no, directory and attempt are decided"),
    events.JobDone: (MADE, "the server's part is given, the answer and all that goes with it is decided"),
    events.JobFailed: (MADE, "a refusal is decided; a server's failure is given"),
    events.JobCancelled: (ASKED, "its client says so, and whether it still can be is decided"),
    events.SeqSkipped: (MADE, "the recorded time passes, and which numbers are skipped is decided"),
    events.Diverged: (LEFT_OUT, "a redo is computed by the trainer: `tink replay train` does that"),
    events.Redone: (LEFT_OUT, "what a training server loses, and when, is its own"),
    events.ModelCreated: (MADE, "comes with its job's end"),
    events.ModelRemoved: (MADE, "comes with its job's end"),
    events.CheckpointSaved: (MADE, "comes with its job's end; the size is given"),
    events.CheckpointForked: (LEFT_OUT, "what a replay of the training made is not made again"),
    events.CheckpointChanged: (ASKED, "its owner says so"),
    events.CheckpointDeleted: (ASKED, "its owner says so; an expired one is retention's, and left out"),
    events.AdapterExported: (MADE, "comes with its job's end; files and size are given"),
    events.AdapterDeleted: (LEFT_OUT, "retention: depends on the settings and on when it looked"),
    events.AdapterPlaced: (
        LEFT_OUT,
        "what a server has is the environment's, but for what a job's end says",
    ),
    events.SnapshotTaken: (LEFT_OUT, "when one is due depends on the settings and on the trainer"),
    events.SnapshotDropped: (LEFT_OUT, "follows from those taken and found damaged, but for a job's end"),
    events.BodiesPruned: (LEFT_OUT, "retention: depends on the settings and on when it looked"),
    events.SamplerCreated: (ASKED, "its client says so, or it comes with its job's end"),
}


def treatment(event: AnyEvent) -> Treatment:
    """Of an event that stands alone, or is the first of those that belong together."""
    if isinstance(event, events.CheckpointDeleted) and event.reason == "expired":
        return LEFT_OUT
    return TREATMENTS[type(event)][0]
