"""Messages of a command that has nothing else to say while it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipeline.waits import long_waits

LOOK_EVERY_S, LONG_S, AGAIN_S = 10.0, 30.0, 60.0
"""How often it is looked for waits, from when on they are said, and after what time again."""


def tell_of_waits(say: Callable[[str], object]) -> None:
    """Say from now on, in a thread of its own, what this process has been waiting for."""

    def watch() -> None:
        said = float("-inf")
        while True:
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() - said >= AGAIN_S and (waits := long_waits(LONG_S)):
                said = time.monotonic()
                say(f"still waiting: {'; '.join(waits)}")

    threading.Thread(target=watch, name="waits", daemon=True).start()
