"""The engines. Each is imported when it is loaded: what it needs is not installed everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tink.errors import StartupError

if TYPE_CHECKING:
    from tink.trainer.engines.base_model import BaseModel


@dataclass(frozen=True)
class Kind:
    """`module` of this package loads the base model; `needed` are the packages of the extra, by the names
    that are imported. `parallel`: it can be in parts on several processes."""

    module: str
    needed: Sequence[str]
    parallel: bool = False


_SHARED = ("torch", "transformers", "safetensors", "tokenizers")
# By the names that --engine and the extras have.
KINDS = {
    "hf": Kind("huggingface", _SHARED),
    "megatron": Kind("megatron", (*_SHARED, "megatron"), parallel=True),
}


def check(engine: str, ranks: int = 1, stages: int = 1) -> None:
    """Raises StartupError if the engine cannot run here, or not on so many processes in so many stages."""
    kind = KINDS[engine]
    missing = [name for name in kind.needed if find_spec(name) is None]
    if missing:
        raise StartupError(
            f"the engine {engine!r} needs {', '.join(missing)}, not installed here: pip install "
            f"'tink[{engine}]'"
        )
    if ranks > 1 and not kind.parallel:
        raise StartupError(f"the engine {engine!r} is one process: start it without torchrun")
    if stages < 1:
        raise StartupError(f"--pipeline-parallel {stages} is not 1 or more")
    if ranks % stages:
        raise StartupError(f"--pipeline-parallel {stages}: {ranks} processes are no multiple of that")


def preload(engine: str) -> None:
    """Imports what `load_base` would, but for the classes of the model itself."""
    _module(engine).preload()


def load_base(
    engine: str, directory: Path, name: str, dtype: str | None, ranks: int = 1, stages: int = 1
) -> BaseModel:
    """The base model in a directory, or this process's part of it. StartupError if it cannot be loaded."""
    parallel = {"ranks": ranks, "stages": stages} if KINDS[engine].parallel else {}
    base: BaseModel = _module(engine).load(directory, name, dtype, **parallel)
    return base


def _module(engine: str) -> Any:
    return import_module(f"{__name__}.{KINDS[engine].module}")
