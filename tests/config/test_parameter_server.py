"""What an experiment may say of a parameter server, and what is refused before submission."""

from __future__ import annotations

from typing import Any

import pytest

from hpcsngd.config.resolve import Resolved, override, resolve
from hpcsngd.errors import ConfigError, PreflightError
from hpcsngd.launch import plan


def made(**settings: Any) -> Resolved:
    changes = [override(name.replace("__", "."), str(value), "test") for name, value in settings.items()]
    return resolve("local", "digits-async", changes, environment={})


def test_keys_and_defaults() -> None:
    found = made(parameter_server__delay__intensity="small").experiment.parameter_server
    assert found is not None
    assert (found.mode, found.partition, found.shares, found.compensation) == ("async", "dealt", "free", None)
    assert found.delay is not None
    assert (found.delay.std_ms, found.delay.kind, found.delay.all_workers) == (5.0, "gaussian", True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"strategy": "ddp"}, "parameter_server: not for strategy ddp"),
        ({"preconditioner__name": "hylo"}, "preconditioner .* not for strategy parameter_server"),
        ({"precision": "fp16"}, "precision: fp16 .* not for strategy"),
        ({"data__workers": 2}, "data.workers .* not for strategy"),
        ({"diagnostics__profiling": "true"}, "diagnostics.profiling: not for strategy"),
        ({"optimizer__name": "lbfgs"}, "optimizer lbfgs cannot be combined with strategy parameter_server"),
        (
            {"parameter_server": "{mode: sync, compensation: {strength: 1}, shares: equal, replay: x}"},
            "compensation, replay, shares: equal: not in mode sync",
        ),
        ({"parameter_server": "{replay: x, shares: equal}"}, "shares: equal says nothing"),
        ({"parameter_server": "{delay: {}}"}, "one of intensity and mean_ms"),
        ({"parameter_server": "{delay: {intensity: small, mean_ms: 3}}"}, "one of intensity and mean_ms"),
        ({"parameter_server": "{delay: {mean_ms: 3, all_workers: false}}"}, "needs a slow_worker"),
        ({"parameter_server": "{delay: {mean_ms: -1}}"}, "greater than or equal to 0"),
        ({"parameter_server": "{compensation: {strength: -1}}"}, "greater than or equal to 0"),
        ({"parameter_server": "{partition: by_color}"}, "dealt"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        made(**settings)


def test_a_server_alone_is_refused() -> None:
    with pytest.raises(PreflightError, match="at least 2 ranks, the server and a worker"):
        plan.make(made(ranks_per_node=1))


def test_ranks_are_started_one_by_one() -> None:
    served, joint = plan.make(made()), plan.make(resolve("local", "digits-sgd", [], environment={}))
    assert (served.mode, served.starts_ranks, joint.starts_ranks) == ("torchrun", True, False)
    assert served.is_served
    assert plan.Plan.from_record(served.to_record()) == served
