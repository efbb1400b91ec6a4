"""What this server can do."""

from __future__ import annotations

from tink.api.call import Call, Table
from tink.api.rest import answers
from tink.api.rest.datums import LOSSES
from tink.api.tinker.client import capabilities


async def losses(call: Call) -> answers.Losses:
    return answers.Losses([answers.Loss(name, inputs) for name, inputs in LOSSES.items()])


TABLE: Table = {
    "/get_server_capabilities": {"GET": capabilities},
    "/list_loss_functions": {"GET": losses},
}
