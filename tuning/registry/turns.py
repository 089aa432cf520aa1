"""Take turns at saying who is champion, so that no two decide beside the same one at once.

MLflow has no locks. Who wants a turn writes a tag of the model and then reads those of all others. Of two that write at
once, at least one sees the other and gives way. A turn counts as long as the process lives that took it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llgbm.runtime import UserError
from tuning.tracking.ownership import SILENT_SECONDS, Driver, Liveness, read_drivers

if TYPE_CHECKING:
    from mlflow import MlflowClient

TURN_TAG = "llgbm.turn."
# A process that died on another machine is waited for until it counts as silent.
PATIENCE_SECONDS = SILENT_SECONDS + 30


@contextmanager
def turn(client: MlflowClient, name: str) -> Iterator[None]:
    """Have the turn at changing the aliases of a model while the block runs.

    Raises UserError if another process keeps it for longer than any change takes.
    """
    own, live = Driver.of_this_process(), Liveness()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        client.set_registered_model_tag(name, TURN_TAG + own.session, own.as_text())
        other = _other(client, name, own, live)
        if other is None:
            break
        client.delete_registered_model_tag(name, TURN_TAG + own.session)
        if time.monotonic() > deadline:
            raise UserError(
                f"model {name!r} is being changed by {other.label}: wait for its end and try again"
            )
        time.sleep(random.uniform(0.05, 0.5))
    try:
        yield
    finally:
        client.delete_registered_model_tag(name, TURN_TAG + own.session)


def _other(client: MlflowClient, name: str, own: Driver, live: Liveness) -> Driver | None:
    """Return who has the turn; what a dead process left is deleted."""
    for driver in read_drivers(client.get_registered_model(name).tags, TURN_TAG):
        if driver.session == own.session:
            continue
        if live.is_alive(driver):
            return driver
        client.delete_registered_model_tag(name, TURN_TAG + driver.session)
    return None
