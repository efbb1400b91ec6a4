"""What repeats are known by where the client does not count. A client's own words are only in `client`, so
no two of these collide: they come in a header, without a line break, and all others begin differently."""

from __future__ import annotations

# Of the session that has a tenant's models and samplers of the REST API, which knows no sessions. No
# client of the SDK can send it.
REST_SESSION = "the REST API\n"

# Of a model's unload_model: asked again, it is the same job, unless that one failed.
UNLOAD = "unload"


def client(words: str) -> str:
    """Of a request whose client gave it a key."""
    return f"client:{words}"


def prompt(number: int, key: str | None) -> str | None:
    """Of the sample of one of a request's prompts; the first has the request's own key, if it has any."""
    return f"prompt {number} of {key}" if key and number else key


def weights(seq_id: int) -> str:
    """Of the save for sampling from what that job of the model has left."""
    return f"weights {seq_id}"


def again(key: str, seq_id: int) -> str:
    """Of another try, after that job of the same key."""
    return f"{key} {seq_id}"
