"""The hybrid method: when it decides, what it says, that it resumes mid-epoch, and damping by epochs."""

from __future__ import annotations

import copy
import io
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsngd.optim import DampingDecay, DampingSteps, HyLo, SwitchRule
from hpcsngd.optim.hybrid import Switch
from tests.optim import models, oracle

STEPS_PER_EPOCH = 4


def decide(
    norms: list[float], lrs: list[float] | None = None, **rule: Any
) -> list[tuple[int, str, str, float]]:
    """Returns the decisions of a run whose accumulated gradient has these norms, one per epoch."""
    switch = Switch(SwitchRule(**rule))
    for epoch, norm in enumerate(norms):
        for part in range(2):
            # Two halves that cancel except for the norm: the criterion looks at the sum, not at each step.
            switch.advance(2 * epoch + part, epoch + part / 2, (lrs or [1.0] * len(norms))[epoch], float)
            switch.add("x", torch.tensor([[norm / 2, 1.0 - 2 * part]], dtype=torch.float64))
    switch.advance(2 * len(norms), len(norms), (lrs or [1.0])[-1], float)
    return [(d.epoch, d.method, d.reason, d.change) for d in switch.history]


def test_critical_while_the_norm_changes() -> None:
    found = decide([8.0, 4.0, 3.0, 3.0, 6.0])
    assert [(epoch, method) for epoch, method, _, _ in found] == [
        (0, "kid"), (1, "kid"), (2, "kid"), (3, "kis"), (4, "kis"), (5, "kid"),
    ]  # fmt: skip
    assert [reason for _, _, reason, _ in found][:3] == ["first epoch", "no finite norms to compare", "norm"]
    assert [change for *_, change in found][2:] == pytest.approx([0.5, 0.25, 0.0, 1.0])


def test_eta_is_the_threshold() -> None:
    assert [method for _, method, _, _ in decide([8.0, 4.0, 3.0], eta=0.2)] == ["kid"] * 4
    assert [method for _, method, _, _ in decide([8.0, 4.0, 3.0], eta=0.6)] == ["kid", "kid", "kis", "kis"]


def test_interval_compares_sums_over_several_epochs() -> None:
    found = decide([1.0, 3.0, 2.0, 2.0, 5.0, 5.0], interval=2)
    assert [(epoch, method) for epoch, method, _, _ in found] == [
        (0, "kid"),
        (2, "kid"),
        (4, "kis"),
        (6, "kid"),
    ]
    assert found[2][3] == pytest.approx(0.0)
    assert found[3][3] == pytest.approx(1.5)


def test_a_drop_of_the_learning_rate_is_critical_until_the_next_check() -> None:
    found = decide([1.0] * 5, [1.0, 1.0, 1.0, 0.3, 0.3])
    assert [method for _, method, _, _ in found] == ["kid", "kid", "kis", "kid", "kis", "kis"]
    assert found[3][2] == "lr dropped from 1"
    # Between checks too.
    found = decide([1.0] * 7, [1.0] * 5 + [0.1] * 2, interval=2)
    assert [(epoch, method) for epoch, method, _, _ in found] == [
        (0, "kid"), (2, "kid"), (4, "kis"), (5, "kid"), (6, "kis"),
    ]  # fmt: skip


def test_a_smooth_decay_is_no_drop() -> None:
    found = decide([1.0] * 8, [math.cos(0.15 * epoch) for epoch in range(8)])
    assert [method for _, method, _, _ in found][2:] == ["kis"] * 7


def test_windows_are_the_published_scripts() -> None:
    """``--adaptive 2 4 5``: KID in epochs 0, 1 and 4."""
    found = decide([1.0] * 6, [0.1**epoch for epoch in range(6)], windows=[(0, 2), (4, 5)])
    assert [method for _, method, _, _ in found] == ["kid", "kid", "kis", "kis", "kid", "kis", "kis"]
    assert found[4][2] == "window (4, 5)"
    assert {method for _, method, _, _ in decide([9.0, 1.0], windows=[])} == {"kis"}


def test_a_norm_that_is_not_finite_decides_nothing() -> None:
    found = decide([4.0, 4.0, math.nan, 4.0, 4.0])
    assert [method for _, method, _, _ in found] == ["kid", "kid", "kis", "kis", "kis", "kis"]
    assert [reason for _, _, reason, _ in found][3] == "no finite norms to compare"


@pytest.mark.parametrize(
    "rule",
    [
        {"eta": 0.0},
        {"interval": 0},
        {"lr_drop": 1.0},
        {"lr_drop": -0.1},
        {"windows": [(3, 3)]},
        {"windows": [(1,)]},
        {"windows": [(-1, 2)]},
    ],
)
def test_bad_rules_are_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(rule))):
        SwitchRule(**rule)


HYBRID: dict[str, Any] = {"method": "hybrid", "ratio": 0.5, "damping": 0.05, "refresh_every": 3}


def train(
    steps: int, options: dict[str, Any], state: dict[str, Any] | None = None, start: int = 0
) -> dict[str, Any]:
    """Trains with four steps per epoch and a learning rate that drops after the third epoch."""
    model = models.mlp()
    hylo = HyLo(model, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    if state is not None:
        model.load_state_dict(state["model"])
        hylo.load_state_dict(state["hylo"])
    records, gradients = [], []
    for step in range(start, steps):
        x, target = oracle.batch(models.mlp(), (12, 5), seed=step % STEPS_PER_EPOCH)
        sgd.zero_grad()
        oracle.mean_loss(model, x, target).backward()
        hylo.set_progress(step / STEPS_PER_EPOCH, 0.02 if step < 3 * STEPS_PER_EPOCH else 0.002)
        hylo.step()
        sgd.step()
        gradients.append([p.grad.clone() for p in model.parameters()])
        records.append(hylo.diagnostics())
    state = copy.deepcopy({"model": model.state_dict(), "hylo": hylo.state_dict()})
    return {"gradients": gradients, "records": records, "state": state}


def test_switches_are_used_logged_and_in_the_records(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = train(16, {**HYBRID, "switch": {"windows": [(0, 1), (2, 3)]}})
    # Refreshes at 0, 3, 6, 9, 12, 15; a switch waits for the next one.
    assert [record.method for record in run["records"]] == (
        ["kid"] * 6 + ["kis"] * 3 + ["kid"] * 3 + ["kis"] * 4
    )
    told = {record.step: [d.method for d in record.switches] for record in run["records"] if record.switches}
    assert told == {1: ["kid"], 5: ["kis"], 9: ["kid"], 13: ["kis"]}
    assert "epoch 2: kid (window (2, 3); change nan, norm nan, lr 0.02)" in caplog.text
    assert {record.kept[0].method for record in run["records"] if record.refresh} == {"kid", "kis"}


@pytest.mark.parametrize("is_critical", [True, False])
def test_equals_the_method_that_it_uses(is_critical: bool) -> None:
    hybrid = train(9, {**HYBRID, "switch": SwitchRule(windows=[(0, 99)] if is_critical else [])})
    single = train(9, {**HYBRID, "method": "kid" if is_critical else "kis"})
    for left, right in zip(hybrid["gradients"], single["gradients"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def same_gradients(left: list[list[Tensor]], right: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("saved_after", range(1, 20))
def test_resume_is_bitwise_across_switches(saved_after: int) -> None:
    """At every phase of epoch and refresh period; the epoch's gradient sum is part of the state."""
    options = {**HYBRID, "switch": {"eta": 0.3}, "damping": DampingDecay(0.1, 0.01, 3.0), "kl_clip": 1e-3}
    whole = train(20, options)
    methods = [record.method for record in whole["records"] if record.refresh]
    assert methods == ["kid", "kid", "kid", "kis", "kid", "kid", "kis"]
    stored = io.BytesIO()
    torch.save(train(saved_after, options)["state"], stored)
    stored.seek(0)
    resumed = train(20, options, torch.load(stored, weights_only=True), saved_after)
    assert same_gradients(resumed["gradients"], whole["gradients"][saved_after:])
    ends = [run["state"]["hylo"]["switch"]["history"] for run in (resumed, whole)]
    assert repr(ends[0]) == repr(ends[1])
    assert [r.damping for r in resumed["records"]] == [r.damping for r in whole["records"][saved_after:]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hybrid"}, "method 'hybrid': call set_progress"),
        ({"damping": {"initial": 1.0, "target": 0.1, "epochs": 9}}, "a damping by epochs: call set_progress"),
        ({"kl_clip": 1e-3}, "kl_clip: call set_progress"),
    ],
)
def test_what_needs_epochs_says_so(options: dict[str, Any], message: str) -> None:
    model = models.mlp()
    hylo = HyLo(model, **options)
    oracle.mean_loss(model, *oracle.batch(models.mlp(), (6, 5))).backward()
    with pytest.raises(RuntimeError, match=message):
        hylo.step()


@pytest.mark.parametrize(("epoch", "lr"), [(-0.1, 0.1), (math.nan, 0.1), (1.0, -1.0), (1.0, math.inf)])
def test_bad_progress_is_refused(epoch: float, lr: float) -> None:
    with pytest.raises(ValueError, match="must be finite and not negative"):
        HyLo(models.mlp()).set_progress(epoch, lr)


def test_a_switch_belongs_to_the_hybrid_method() -> None:
    with pytest.raises(ValueError, match="method 'kid' does not switch"):
        HyLo(models.mlp(), method="kid", switch={"eta": 0.1})


def test_damping_decays_by_epochs() -> None:
    """The recursion of the paper once per epoch, whatever the number of steps and refreshes in it."""
    decay = DampingDecay(1.5, 0.1, 90, warmup_epochs=5)
    expected, alpha = 1.5, 2 * math.log10(15) / 90
    for epoch in range(100):
        if epoch > 5:
            expected = (1 - alpha) * expected + alpha * 0.1
        assert decay.at_epoch(epoch) == pytest.approx(expected, rel=1e-12)
    assert decay.at_epoch(95) == pytest.approx(0.229, abs=1e-3)


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_damping_is_the_epochs_at_the_refresh(refresh_every: int) -> None:
    decay = {"initial": 0.1, "target": 0.01, "epochs": 4.0}
    records = train(10, {"damping": decay, "refresh_every": refresh_every})["records"]
    for step, record in enumerate(records):
        refreshed = step - step % refresh_every
        assert record.damping == DampingDecay(**decay).at_epoch(refreshed / STEPS_PER_EPOCH)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 0.1, "target": 1.0, "epochs": 9}, "0 < target <= initial"),
        ({"initial": 1.0, "target": 0.0, "epochs": 9}, "0 < target <= initial"),
        ({"initial": 1.0, "target": 0.1, "epochs": 2}, "needs more than 2 epochs"),
        ({"initial": 1.0, "target": 0.1, "epochs": 9, "warmup_epochs": -1}, "warmup_epochs=-1"),
    ],
)
def test_bad_decays_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DampingDecay(**fields)


def test_constant_decay_is_constant() -> None:
    assert DampingDecay(0.3, 0.3, 10).at_epoch(7.5) == 0.3


def test_damping_steps_at_its_milestones() -> None:
    steps = {"initial": 0.2, "factor": 0.5, "milestones": [1, 2]}
    records = train(3 * STEPS_PER_EPOCH, {"damping": steps, "refresh_every": 1})["records"]
    expected = [0.2 * 0.5 ** (step // STEPS_PER_EPOCH) for step in range(3 * STEPS_PER_EPOCH)]
    assert [record.damping for record in records] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": 0.0, "factor": 0.5, "milestones": (1,)}, "must be positive"),
        ({"initial": 0.1, "factor": -1.0, "milestones": (1,)}, "must be positive"),
        ({"initial": 0.1, "factor": 0.5, "milestones": (2, 1)}, "must rise"),
    ],
)
def test_bad_steps_of_damping_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DampingSteps(**fields)
