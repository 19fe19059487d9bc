"""Which method and damping a refresh of HyLo uses: by step, by epoch, and by the hybrid method's switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from hpcsngd.optim.checks import check_progress
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.options import Options, damping_at
from hpcsngd.optim.records import SwitchDecision
from hpcsngd.optim.refresh import Moment
from hpcsngd.optim.sketches import Plain


class Steering:
    """Follows the epochs and the learning rate where a setting wants them.

    Args:
        options: of HyLo.
        communicator: makes the ranks agree on the switch.

    Attributes:
        progress: epochs done and learning rate of the coming step, once they were told.
    """

    def __init__(self, options: Options, communicator: Communicator) -> None:
        self._options, self._communicator = options, communicator
        self._schedule, self._switch = options.damping_schedule(), options.new_switch()
        self._told = 0
        self.progress: tuple[float, float] | None = None

    @property
    def method(self) -> Plain:
        """Returns the method of a refresh that happened now."""
        if self._options.method == "hybrid":
            return "kid" if self._switch is None or self._switch.is_critical else "kis"
        return self._options.method

    @property
    def lr(self) -> float | None:
        """Returns the learning rate of the coming step, if it is known."""
        return self.progress[1] if self.progress else None

    @property
    def watch(self) -> Callable[[str, Tensor], None] | None:
        """Returns what wants to see every layer's plain gradient."""
        return None if self._switch is None else self._switch.add

    def moment(self, step: int) -> Moment:
        """Returns what a refresh at ``step`` uses; raises ValueError if a schedule left its range."""
        epoch = self.progress[0] if self.progress else None
        return Moment(step, self.method, damping_at(self._schedule, epoch, step))

    def advance(self, step: int, epoch: float, lr: float) -> None:
        """Takes the arguments of `HyLo.set_progress`; raises ValueError for numbers that cannot be."""
        check_progress(epoch, lr)
        self.progress = (float(epoch), float(lr))
        if self._switch is not None:
            self._switch.advance(step, epoch, lr, partial(self._communicator.from_first, "switch"))

    def check(self) -> None:
        """Raises RuntimeError where a setting needs the progress and nobody told it."""
        wanting = self._options.needs_progress()
        if self.progress is None and wanting:
            raise RuntimeError(f"{wanting}: call set_progress(epoch, lr) before step()")

    def take_decisions(self) -> tuple[SwitchDecision, ...]:
        """Returns the switch's decisions since the last call."""
        new = () if self._switch is None else tuple(self._switch.history[self._told :])
        self._told += len(new)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Returns the progress and the switch."""
        switch = None if self._switch is None else self._switch.state_dict()
        return {"progress": self.progress, "switch": switch}

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Continues from ``state``.

        Args:
            state: with what `state_dict` returned.
            like: layer -> an empty tensor on the device and in the dtype of its gradient.
        """
        self.progress = None if state["progress"] is None else tuple(state["progress"])
        if self._switch is not None and state["switch"] is not None:
            self._switch.load_state_dict(state["switch"], like)
            self._told = len(self._switch.history)
