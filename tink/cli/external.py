"""The training server that somebody else runs: `tink doctor` asks it too, and needs nothing that serves."""

from __future__ import annotations

from tink.backends.endpoint import ExternalEndpoint
from tink.settings import Settings


def external(settings: Settings) -> ExternalEndpoint:
    """Where the settings say that it is."""
    return ExternalEndpoint(
        settings.megatron_server_url,
        settings.trainer_token,
        model=settings.hf_model,
        name=settings.hf_model_name,
    )
