"""The real worker, of which number 2 fails by itself after its first gradient."""

from __future__ import annotations

from hpcsngd.train import worker
from hpcsngd.train.parameter_server.engine import Push
from hpcsngd.train.parameter_server.link import Assignment
from hpcsngd.train.parameter_server.worker import Worker

_compute = Worker._compute


def compute_once(self: Worker, assignment: Assignment) -> Push:
    if self._number == 2 and self._pushed:
        raise RuntimeError("no such luck")
    return _compute(self, assignment)


if __name__ == "__main__":
    Worker._compute = compute_once  # type: ignore[method-assign]
    worker.run()
