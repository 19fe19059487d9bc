"""The real worker, slowed down so that a test can interrupt it, and stuck where a test asks for it."""

from __future__ import annotations

import os
import time

from hpcsngd import dist
from hpcsngd.train import worker
from hpcsngd.train.loop import Trainer

STEP_S = float(os.environ["SLOW_STEP_S"])
HANG_RANK = int(os.environ.get("HANG_RANK", "-1"))

_step = Trainer._step


def slow_step(self: Trainer, position: int) -> bool:
    time.sleep(STEP_S)
    if dist.rank() == HANG_RANK and self.progress.step == 3:
        time.sleep(600)
    return _step(self, position)


if __name__ == "__main__":
    Trainer._step = slow_step  # type: ignore[method-assign]
    worker.run()
