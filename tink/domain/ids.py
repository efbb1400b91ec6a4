"""Ids and addresses. All of them are deterministic functions of the session's random id and of numbers
that the client counts, so that a repeated request names the same thing."""

from __future__ import annotations

import hashlib
import re
from typing import Literal, NamedTuple

from tink.errors import UserError
from tink.limits import MAX_NAME

CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]

KINDS: tuple[CheckpointKind, ...] = ("weights", "sampler_weights", "external_weights")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@-]*")
_HEX = re.compile(r"[0-9a-f]{32}")


def is_session(text: str) -> bool:
    """Whether it is the id of one, made here."""
    return _HEX.fullmatch(text) is not None


def model_id(session_id: str, model_seq_id: int) -> str:
    return f"{session_id}:train:{model_seq_id}"


def sampler_id(session_id: str, sampling_seq_id: int) -> str:
    return f"{session_id}:sample:{sampling_seq_id}"


def number(name: str) -> int:
    """A number that stands for a name: of what nobody counts."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 2


def job_id(owner: str, seq_id: int) -> str:
    """`owner` is a model id or a sampler id. The dedupe key and the promise are this one string."""
    return f"{owner}:{seq_id}"


def sequence_ids(job: str, num_samples: int) -> list[str]:
    return [f"{job}:{i}" for i in range(num_samples)]


class Place(NamedTuple):
    session_id: str
    model_id: str

    @classmethod
    def of_model(cls, model_id: str) -> Place | None:
        """None if that cannot be a model's id."""
        session_id, mark, number = model_id.rpartition(":train:")
        return cls(session_id, model_id) if mark and number.isdigit() else None


def adapter_id(model: str, version: int) -> str:
    """The immutable name of an exported adapter version, never used twice."""
    return f"{model}@{version}"


# Where directories of the artifact folder are written before they are published, and taken apart.
SCRATCH = ".tmp"
FORK = "fork-"


def model_directory(model: str) -> str:
    """Where the files of a model's operations go, relative to the artifact folder."""
    session, _, number = model.partition(":train:")
    return f"{session}/{number}"


def directory(model: str, op_no: int, kind: str) -> str:
    """Where an operation's files go, relative to the artifact folder: made of ids that Tink gave."""
    return f"{model_directory(model)}/{op_no:08d}-{kind}"


def fork(fork_id: str) -> str:
    """What a fork is called, as a checkpoint and in the scratch folder. `fork_id`: 32 hex digits."""
    if not _HEX.fullmatch(fork_id):
        raise UserError(f"{fork_id[:80]!r} is not the id of a fork: 32 hex digits are")
    return f"{FORK}{fork_id}"


def first_adapter(model: str, op_no: int) -> str:
    """Where the operation that makes a model writes its adapter's version 0."""
    return directory(model, op_no, "adapter")


def check_name(name: str) -> str:
    """`name` if a checkpoint may be called so. A name is only ever a key, never a path; the rule keeps
    it whole in the three-part addresses that clients build from it."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"the checkpoint name {name[:80]!r} cannot be used: letters, digits and . _ + = @ - only, "
            f"beginning with a letter or digit, without '..', at most {MAX_NAME} characters"
        )
    return name


class Address(NamedTuple):
    """A checkpoint's address, `tinker://{model_id}/{kind}/{name}`."""

    model_id: str
    kind: CheckpointKind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Address:
        parts = text.removeprefix("tinker://").split("/")
        if not text.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS:
            raise UserError(
                f"{text[:200]!r} is not a checkpoint address: tinker://RUN_ID/weights/NAME "
                "(or sampler_weights, external_weights) is"
            )
        return cls(parts[0], parts[1], check_name(parts[2]))
