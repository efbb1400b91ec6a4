"""The engine of a training server, made from its options. Torch is imported when that is called for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from tink import crash, pretrained
from tink.home import Home
from tink.trainer import engines
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines.interface import Engine
from tink.trainer.options import Options
from tink.world import World

# What of a hub's repository an engine reads.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@contextmanager
def _uncollected() -> Iterator[None]:
    """For what is made once and stays: to look through it for garbage again and again would take a fifth
    of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@_uncollected()
def import_engine(kind: str) -> None:
    """What `engine` would import, but for the classes of the model itself."""
    import_module("tink.trainer.tiny")
    import_module("tink.trainer.engines.lora_engine")
    engines.preload(kind)


def engine(options: Options, incarnation: str, world: World) -> Engine:
    """In a thread: importing torch and reading the model takes seconds."""
    if options.ranks == 1:
        return load(options, incarnation)
    from tink.trainer.engines import lockstep

    # The others wait for this one, or have failed as well: who started them shall know.
    with lockstep.to_the_end():
        return lockstep.Leader(load(options, incarnation), lockstep.gather(), world.lock())


@_uncollected()
def load(options: Options, incarnation: str) -> Engine:
    """This process's own: the whole of it, or one rank's."""
    from tink.trainer import tiny
    from tink.trainer.engines.lora_engine import LoraEngine

    crash.point("trainer.loading")
    if options.model is None:
        directory, name = tiny.ensure(options.home), pretrained.BUILT_IN
        # It is on no hub, where clients would look for its tokenizer by its name.
        tiny.publish_tokenizer(directory)
    else:
        directory, name = pretrained.find(options.model, MODEL_FILES), options.model
    artifacts = Artifacts(options.artifacts or Home(options.home).artifacts, incarnation)
    base = engines.load_base(
        options.engine,
        directory,
        options.model_name or name,
        options.dtype,
        options.ranks,
        options.pipeline_parallel,
    )
    return LoraEngine(base, artifacts, options.threads, options.micro_batch_tokens)
