"""When curvature is recomputed, what stays in between, and that a resumed run continues bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpcsngd.optim import HyLo
from tests.optim import models, oracle, training

OPTIONS = {"damping": 0.05, "method": "kis", "ratio": 0.5, "seed": 4}
RESUMED = {
    "kis": OPTIONS,
    "unbiased kis": {**OPTIONS, "unbiased": True, "complement": "residual"},
    "kid": {**OPTIONS, "method": "kid", "complement": "plain"},
    "local kid": {**OPTIONS, "method": "kid", "kid_scope": "local", "residual": True},
    "sngd": {"damping": 0.05, "seed": 4},
}


def refreshes(steps: int, **options: Any) -> list[int]:
    """Returns the 0-based steps that refreshed."""
    records = training.train("mlp", [6], steps, {"damping": 0.05, **options})["records"]
    assert [record.step for record in records] == list(range(1, steps + 1))
    return [record.step - 1 for record in records if record.refresh]


@pytest.mark.parametrize(
    ("refresh_every", "expected"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (3, [0, 3, 6]),
        (100, [0]),
        (lambda step: 1 if step < 3 else 2, [0, 1, 2, 4, 6]),
    ],
)
def test_refresh_steps(refresh_every: float | Callable[[int], float], expected: list[int]) -> None:
    assert refreshes(7, refresh_every=refresh_every) == expected


def test_curvature_stays_between_refreshes() -> None:
    """The second step solves with the first batch's curvature and damping, not with its own."""
    model = models.mlp()
    hylo = HyLo(model, damping=lambda step: 0.05 * (step + 1), refresh_every=2)
    first, second = (oracle.batch(models.mlp(), (8, 5), seed=seed) for seed in (1, 2))
    oracle.mean_loss(model, *first).backward()
    hylo.step()
    model.zero_grad()
    oracle.mean_loss(model, *second).backward()
    assert hylo._capture.micro_batches == 0
    plain = oracle.layer_gradient(model[0])
    hylo.step()
    found = oracle.layer_gradient(model[0])
    assert hylo.diagnostics().damping == 0.05
    hylo.close()
    expected = oracle.dense_solution(oracle.true_gradients(model, model[0], *first), plain, 0.05)
    assert oracle.relative_error(found, expected) < 1e-10


def test_damping_follows_its_schedule_at_refreshes() -> None:
    options = {"damping": lambda step: 1.0 / (step + 1), "refresh_every": 2}
    records = training.train("mlp", [6], 4, options)["records"]
    assert [record.damping for record in records] == [1.0, 1.0, 1 / 3, 1 / 3]


def test_a_step_without_backward_does_not_count_as_refresh() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, refresh_every=3)
    hylo.step()
    assert not hylo.diagnostics().refresh
    oracle.mean_loss(model, *oracle.batch(model, (6, 5))).backward()
    hylo.step()
    assert hylo.diagnostics().refresh


@pytest.mark.parametrize("kind", training.BUILDERS)
@pytest.mark.parametrize("method", RESUMED)
@pytest.mark.parametrize("saved_after", [1, 2, 3, 4, 5, 6])
def test_resume_is_bitwise_at_every_phase(kind: str, method: str, saved_after: int) -> None:
    options = {**RESUMED[method], "refresh_every": 3}
    uninterrupted = training.train(kind, [8], 8, options)
    saved = io.BytesIO()
    torch.save(training.train(kind, [8], saved_after, options)["state"], saved)
    saved.seek(0)
    # The seed of the draws comes from the state, not from the constructor.
    resumed = training.train(kind, [8], 8, {**options, "seed": 99}, torch.load(saved, weights_only=True))
    for left, right in zip(resumed["gradients"], uninterrupted["gradients"], strict=True):
        assert torch.equal(left, right)
    for name, weight in uninterrupted["state"]["model"].items():
        assert torch.equal(resumed["state"]["model"][name], weight)
    assert resumed["records"][-1].refresh == uninterrupted["records"][-1].refresh


def test_saved_state_does_not_change_afterwards() -> None:
    model = models.mlp()
    hylo = HyLo(model, damping=0.05)
    for seed in (1, 2):
        oracle.mean_loss(model, *oracle.batch(model, (6, 5), seed=seed)).backward()
        hylo.step()
        if seed == 1:
            state = hylo.state_dict()
            before = {name: layer["factor"].clone() for name, layer in state["layers"].items()}
    assert state["step"] == 1
    for name, factor in before.items():
        assert torch.equal(state["layers"][name]["factor"], factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "hylo/0"}, "state has format 'hylo/0'; this is 'hylo/3'"),
        ({"layers": {"9": {}}}, "state has layers that are not covered here: 9"),
    ],
)
def test_foreign_state_is_refused(change: dict[str, Any], message: str) -> None:
    hylo = HyLo(models.mlp(), damping=0.05)
    with pytest.raises(ValueError, match=message):
        hylo.load_state_dict({**hylo.state_dict(), **change})


def test_state_of_another_shape_names_the_layer() -> None:
    state = training.train("mlp", [6], 1, {"damping": 0.05})["state"]["hylo"]
    hylo = HyLo(models.mlp(bias=False), damping=0.05)
    with pytest.raises(ValueError, match=r"state of layer 0: rows have shapes \[\(6, 1, 1, 6\)"):
        hylo.load_state_dict(state)
