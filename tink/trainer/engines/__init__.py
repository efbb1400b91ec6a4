"""The engines. Each is imported when it is loaded: what it needs is not installed everywhere."""

from __future__ import annotations

from importlib.util import find_spec

from tink.errors import StartupError

# Of the extra `hf`, by the name that is imported.
NEEDED = ("torch", "transformers", "safetensors", "tokenizers")


def check() -> None:
    """Raises StartupError if what the engine needs is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise StartupError(
            f"the engine 'hf' needs {', '.join(missing)}, not installed here: pip install 'tink[hf]'"
        )
