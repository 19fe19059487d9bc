from __future__ import annotations

import pytest

from hpcsngd.config.experiment import Schedule
from hpcsngd.train.schedules import multiplier


def curve(steps: list[int], **fields: object) -> list[float]:
    schedule = Schedule.model_validate(fields)
    return [multiplier(schedule, step, steps_per_epoch=10, epochs=5) for step in steps]


def test_constant_is_one() -> None:
    assert curve([0, 7, 49]) == [1, 1, 1]


def test_warm_up_rises_per_step_and_ends_at_one() -> None:
    # from 0.2 by 0.8 / 20 per step
    expected = [0.2, 0.24, 0.6, 0.96, 1.0]
    assert curve([0, 1, 10, 19, 20], warmup_epochs=2, warmup_start=0.2) == pytest.approx(expected)


def test_milestones_act_from_their_epoch_on() -> None:
    expected = [1, 1, 0.5, 0.5, 0.25]
    assert curve([0, 19, 20, 34, 35], kind="milestones", milestones=[2, 3.5], gamma=0.5) == expected


def test_milestones_do_not_interrupt_the_warm_up() -> None:
    fields = {"kind": "milestones", "milestones": [1], "gamma": 0.1, "warmup_epochs": 2, "warmup_start": 0}
    assert curve([15, 20], **fields) == pytest.approx([0.75, 0.1])


def test_cosine_falls_from_the_warm_up_to_the_final_value() -> None:
    # half way between steps 10 and 50 the cosine is at (1 + final) / 2
    expected = [1.0, 0.6, 0.2]
    assert curve([10, 30, 50], kind="cosine", warmup_epochs=1, final=0.2) == pytest.approx(expected)


def test_cosine_at_a_quarter() -> None:
    # (1 + cos(pi / 4)) / 2
    assert curve([20], kind="cosine", warmup_epochs=1) == pytest.approx([0.8535533905932737])


def test_linear_falls_evenly() -> None:
    assert curve([0, 25, 50], kind="linear", final=0.5) == pytest.approx([1.0, 0.75, 0.5])


def test_a_warm_up_as_long_as_the_run_never_gets_to_the_shape() -> None:
    assert curve([0, 49], kind="cosine", warmup_epochs=5, warmup_start=0) == pytest.approx([0, 0.98])


def test_by_epoch_the_rate_changes_when_an_epoch_begins() -> None:
    # HyLo's script: (1/P)(e (P - 1)/warmup + 1) for 4 ranks and 2 epochs of 10 steps
    rates = curve([0, 9, 10, 19, 20], warmup_epochs=2, warmup_start=0.25, by="epoch")
    assert rates == pytest.approx([0.25, 0.25, 0.625, 0.625, 1])


def test_inverse_sqrt_is_that_of_the_transformer() -> None:
    """d^-0.5 min(s^-0.5, s w^-1.5) over its largest value, (d w)^-0.5, for update s = step + 1."""
    w = 4000
    steps = [0, 999, 3999, 4000, 15999]
    expected = [min(s**-0.5, s * w**-1.5) * w**0.5 for s in (1, 1000, 4000, 4001, 16000)]
    found = curve(steps, kind="inverse_sqrt", warmup_steps=w)
    assert found == pytest.approx(expected)
    assert found[2] == 1
    assert found[4] == 0.5


def test_inverse_sqrt_takes_no_epochs() -> None:
    for fields in ({"warmup_epochs": 1}, {"by": "epoch"}):
        with pytest.raises(ValueError, match="inverse_sqrt goes by steps"):
            Schedule.model_validate({"kind": "inverse_sqrt", **fields})


def test_plateau_falls_with_each_evaluation_that_is_no_better() -> None:
    schedule = Schedule.model_validate(
        {"kind": "plateau", "gamma": 0.25, "warmup_epochs": 1, "warmup_start": 0}
    )
    for plateaus, expected in ((0, 1), (1, 0.25), (3, 0.25**3)):
        assert multiplier(schedule, 30, steps_per_epoch=10, epochs=5, plateaus=plateaus) == expected
    assert multiplier(schedule, 5, steps_per_epoch=10, epochs=5, plateaus=1) == 0.125
