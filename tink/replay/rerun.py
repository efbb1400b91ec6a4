"""The operations of a schedule, sent to a training server that holds nothing, and what they give."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import msgspec
import trio

from tink.backends.trainer import TrainerGone, TrainerRefused
from tink.domain.ledger import Ledger
from tink.errors import BackendError, UserError
from tink.journal.recording import Recording
from tink.limits import HOLD_SECONDS, POLL_SECONDS, REPLAY_AHEAD
from tink.replay.comparison import Comparison, compare, gives_results
from tink.replay.server import Server
from tink.replay.training import Schedule, Turn
from tink.wire import tink_train
from tink.world import World

# What comes after it would be applied to something else.
MAKES = frozenset({"create_model", "load_weights"})


class Rerun:
    """Once through a schedule. `stored`: the sha256 of the bodies that are there. `ended` is called after
    each operation. Methods raise BackendError if the server does not go on; it is not tried again, for the
    journal is still there."""

    _lease = 1  # a server that holds nothing has had no worker before

    def __init__(
        self,
        schedule: Schedule,
        server: Server,
        recording: Recording,
        ledger: Ledger,
        stored: set[str],
        world: World,
        ended: Callable[[], None],
    ) -> None:
        self._schedule, self._server, self._recording = schedule, server, recording
        self._ledger, self._stored, self._world = ledger, stored, world
        self._ended = ended
        self._out: deque[tuple[Turn, tink_train.OpRequest]] = deque()
        self._acked = 0
        self._also_done = 0
        self.comparisons: list[Comparison] = []
        self.seconds = 0.0

    @property
    def recorded_seconds(self) -> float:
        """What the same operations took when they ran first, without the pauses between them."""
        return sum(turn.job.run_ms or 0.0 for turn in self._schedule.turns if turn.filler is None) / 1000

    async def run(self) -> None:
        """Fills `comparisons`, in order. `seconds`: what it took, without the restore of a snapshot."""
        await self._restore()
        began = self._world.monotonic()
        for turn in self._schedule.turns:
            while len(self._out) >= REPLAY_AHEAD:
                await self._take()
            request = await self._request(turn)
            await self._submit(turn, request)
        while self._out:
            await self._take()
        self.seconds = self._world.monotonic() - began

    async def export(self) -> tuple[str, list[tink_train.File]]:
        """Writes the adapter as it is now, under the server's artifacts: where, and its files."""
        path = self._new_directory()
        return path, await self._also("export", tink_train.ExportAdapter(path))

    async def save(self) -> str:
        """Writes weights and optimizer as they are now, under the server's artifacts: where."""
        path = self._new_directory()
        await self._also("save", tink_train.SaveState(path))
        return path

    # -- the inside ---------------------------------------------------------------------------------

    def _new_directory(self) -> str:
        return f"replay/{self._world.new_id()}"

    async def _also(self, name: str, op: tink_train.Op) -> list[tink_train.File]:
        """An operation behind those of the schedule, and the files that it writes."""
        self._also_done += 1
        op_no = self._schedule.last + self._also_done
        request = self._op_request(op_no, f"{self._schedule.model_id}:{name}", op)
        with self._translated(f"the {name} behind the replay"):
            reply = await self._server.client.op(request)
        if reply.result is None:
            raise BackendError(f"what the replay came to cannot be written: {_why(reply)}")
        self._acked = op_no
        return reply.result.files

    async def _restore(self) -> None:
        start = self._schedule.start
        if start is None:
            return
        request = tink_train.RestoreRequest(
            self._server.info.incarnation, self._lease, self._schedule.model_id, start.directory
        )
        with self._translated(f"the snapshot {start.snapshot_id}"):
            restored = (await self._server.client.restore(request)).applied
        if restored != start.op_no:
            raise BackendError(f"the snapshot {start.snapshot_id} is one of operation {restored}")
        self._acked = restored

    async def _request(self, turn: Turn) -> tink_train.OpRequest:
        body = b""
        if turn.filler is None:
            try:
                body = await self._world.run_sync(self._recording.request, turn.job)
            except LookupError as error:
                raise UserError(f"{turn.job.job_id} cannot be sent again: {error}") from error
        op = turn.operation(body, self._ledger, self._schedule.edits)
        return self._op_request(turn.op_no, turn.job.job_id, op)

    def _op_request(self, op_no: int, job_id: str, op: tink_train.Op) -> tink_train.OpRequest:
        return tink_train.OpRequest(
            incarnation=self._server.info.incarnation,
            lease=self._lease,
            model_id=self._schedule.model_id,
            op_no=op_no,
            job_id=job_id,
            op=op,
            acked=self._acked,
            wait=HOLD_SECONDS,
        )

    async def _submit(self, turn: Turn, request: tink_train.OpRequest) -> None:
        with self._translated(turn.job.job_id):
            while True:
                try:
                    await self._server.client.submit(request)
                except TrainerRefused as error:
                    if error.refusal.error != "busy":
                        raise
                else:
                    break
                # It queues fewer than this one would.
                if self._out:
                    await self._take()
                else:
                    await trio.sleep(POLL_SECONDS)
        # Its end is asked for by its number: the body is not needed any more.
        self._out.append((turn, msgspec.structs.replace(request, op=tink_train.Skip())))

    async def _take(self) -> None:
        """The end of the first that is out."""
        turn, request = self._out.popleft()
        with self._translated(turn.job.job_id):
            reply = await self._server.client.ended(request)
        if turn.filler is None and reply.failure is not None and turn.job.op in MAKES:
            raise BackendError(f"{turn.job.job_id} cannot be done again: {reply.failure.message}")
        self._acked = turn.op_no
        if gives_results(turn):
            self.comparisons.append(await self._compare(turn, reply))
        self._ended()

    async def _compare(self, turn: Turn, reply: tink_train.OpReply) -> Comparison:
        digest = turn.job.result_sha256
        if digest is None or digest not in self._stored:
            return compare(turn, reply, None)
        try:
            recorded = await self._world.run_sync(self._recording.body, digest)
        except LookupError as error:
            return compare(turn, reply, None, f"its recorded result cannot be read: {error}")
        return await self._world.run_sync(partial(compare, turn, reply, recorded))

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Around a call: what a lost server means here."""
        try:
            yield
        except TrainerGone as error:
            raise BackendError(
                f"the replay's training server was lost at {what}: run it again ({error})"
            ) from error
        except TrainerRefused as error:
            if error.refusal.error == "stale_incarnation":
                raise BackendError(
                    f"the replay's training server was killed at {what}: run it again"
                ) from error
            raise BackendError(f"the replay's training server refuses {what}: {error}") from error


def _why(reply: tink_train.OpReply) -> str:
    return reply.failure.message if reply.failure else reply.state
