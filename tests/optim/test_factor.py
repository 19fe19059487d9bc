"""The kept Cholesky factor against one from scratch; float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsngd.optim import mfac
from hpcsngd.optim.factor import RingFactor
from hpcsngd.optim.mfac import MFAC
from hpcsngd.optim.window import Ring, solve_shifted
from tests.optim.test_mfac import DAMPING, fisher_solution, gradients, parameters, relative, stepped

SHIFT = 0.3


class Window:
    """A ring of random gradients."""

    def __init__(self, capacity: int, size: int = 12) -> None:
        self.ring = Ring(capacity, torch.device("cpu"))
        self._rows = torch.zeros(capacity, size, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(capacity)

    def step(self) -> None:
        slot = self.ring.advance()
        self._rows[slot] = torch.randn(self._rows.shape[1], generator=self._generator, dtype=torch.float64)
        self.ring.set_row(self._rows[: self.ring.count] @ self._rows[slot])


def anew(ring: Ring, vector: Tensor, shift: float = SHIFT) -> Tensor:
    found = solve_shifted(ring.gram, shift, vector)
    assert found is not None
    assert found[1] == 0
    return found[0]


def solved(factor: RingFactor, vector: Tensor, shift: float = SHIFT) -> Tensor:
    found = factor.solve(shift, vector)
    assert found is not None
    return found


@pytest.mark.parametrize("capacity", [1, 7, 8, 20, 24])
@pytest.mark.parametrize("block", [1, 4, 8, 32])
def test_it_solves_like_a_factor_from_scratch(capacity: int, block: int) -> None:
    """While filling, full and wrapped; blocks that do not divide the ring, and blocks larger than it."""
    window = Window(capacity)
    factor = RingFactor(window.ring, block)
    for step in range(3 * capacity + 2):
        window.step()
        vectors = [window.ring.unit(), torch.arange(window.ring.count, dtype=torch.float64) - step]
        for vector in vectors:
            assert torch.allclose(solved(factor, vector), anew(window.ring, vector), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("steps", [3, 8, 9, 11, 15, 20, 21, 27, 30, 40, 43])
def test_begun_anywhere_it_has_the_bits_of_one_that_followed(steps: int) -> None:
    """A resumed run makes the factor anew in the middle of a block."""
    window = Window(20)
    followed = RingFactor(window.ring, 8)
    for _ in range(steps):
        window.step()
        solved(followed, window.ring.unit())
    vector = torch.linspace(-1, 1, window.ring.count, dtype=torch.float64)
    begun = RingFactor(window.ring, 8)
    for right_side in (window.ring.unit(), vector):
        assert torch.equal(solved(begun, right_side), solved(followed, right_side))


def test_steps_without_a_solve_and_other_shifts_are_noticed() -> None:
    window = Window(20)
    factor = RingFactor(window.ring, 8)
    for pause, shift in ((1, SHIFT), (3, SHIFT), (1, 2.0), (9, 2.0), (13, SHIFT), (1, SHIFT)):
        for _ in range(pause):
            window.step()
        unit = window.ring.unit()
        expected = anew(window.ring, unit, shift)
        assert torch.allclose(solved(factor, unit, shift), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("where", [2, 13])
def test_what_is_not_positive_definite_has_no_solution(where: int) -> None:
    """In the part that rests and in the block of the newest slot."""
    window = Window(20)
    factor = RingFactor(window.ring, 8)
    for _ in range(32):
        window.step()
    solved(factor, window.ring.unit())
    assert factor.memory_bytes() > 0
    window.ring.gram[where, where] = -1.0
    factor.reset()
    assert factor.solve(SHIFT, window.ring.unit()) is None
    assert factor.memory_bytes() == 0
    assert solve_shifted(window.ring.gram, 1e-12, window.ring.unit()) is None


@pytest.mark.parametrize("rule", ["window", "count"])
def test_a_kept_factor_changes_nothing_and_resumes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    """Blocks of 4, a window of 11: while filling, full, wrapped, and begun in the middle of a block."""
    params, twins = parameters(), parameters()
    options: dict[str, Any] = {"damping": DAMPING, "scale_rule": rule, "weight_decay": 0.1}
    plain = MFAC(twins, 11, **options)
    monkeypatch.setattr(mfac, "BLOCK", 1)
    method = MFAC(params, 11, **options)
    assert plain._factor is None
    assert method._factor is not None
    monkeypatch.setattr(method._factor, "_size", 4)
    stream, states = gradients(30), {}
    found = []
    for step, gradient in enumerate(stream):
        states[step] = method.state_dict()
        found.append(stepped(method, params, gradient))
        assert relative(found[-1], stepped(plain, twins, gradient)) < 1e-11
        held = {item.kind: item.size_bytes for item in method.diagnostics().memory}
        assert (held["factor"] > 0) == (step >= 10 or (rule == "window" and step >= 4))
        if held["factor"] and step >= 10:
            outside = 11 - min(4, 11 - step % 11 // 4 * 4)
            assert held["factor"] == 8 * (outside * outside + 4 * outside)
    for begin in (0, 5, 10, 14, 21, 27):
        resumed = MFAC(params, 11, **options)
        assert resumed._factor is not None
        monkeypatch.setattr(resumed._factor, "_size", 4)
        resumed.load_state_dict(states[begin])
        assert all(
            torch.equal(stepped(resumed, params, stream[step]), found[step]) for step in range(begin, 30)
        )


def test_a_damping_of_its_own_in_each_step_keeps_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfac, "BLOCK", 1)
    params = parameters()
    method = MFAC(params, 11, damping=lambda step: DAMPING / (step + 1))
    window = gradients(11)
    for step, gradient in enumerate(window):
        found = stepped(method, params, gradient)
        exact = fisher_solution(window[: step + 1], 11, gradient, DAMPING / (step + 1))
        assert relative(found, exact) < 1e-9
    assert {item.kind: item.size_bytes for item in method.diagnostics().memory}["factor"] == 0
