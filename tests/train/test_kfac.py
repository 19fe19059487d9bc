"""Whole runs with K-FAC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsngd.train import models
from tests.train.runs import assert_same_weights, dropout_net, make_run, rows, train, weights
from tests.train.test_session import finished, request_stop_at

KFAC = {
    "preconditioner.name": "kfac",
    "preconditioner.damping": "0.1",
    "preconditioner.factor_every": "2",
    "preconditioner.inverse_every": "3",
    "optimizer.lr": "0.01",
}


# Factored damping damps more and takes shorter steps at the same rate.
@pytest.mark.parametrize(("inverse", "lr"), [("eigen", "0.003"), ("cholesky", "0.006")])
def test_digits_are_learned(tmp_path: Path, inverse: str, lr: str) -> None:
    settings = {"data.train_limit": "null", "data.test_limit": "null", "epochs": "4", "batch_size": "32"}
    settings |= KFAC | {"preconditioner.inverse": inverse, "optimizer.lr": lr}
    run = make_run(tmp_path, **settings, **{"schedule.kind": "cosine"})
    assert train(run)
    assert finished(run)["test_accuracy"] >= 0.95


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preconditioner.fisher": "mc", "preconditioner.inverse": "cholesky"},
        {"preconditioner.kl_clip": "0.001", "preconditioner.factor_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """With batch norm and dropout, stopped between two refreshes."""
    monkeypatch.setitem(models.MODELS, "digits-cnn", dropout_net)
    whole, parted = (make_run(tmp_path, **(KFAC | settings)) for _ in range(2))
    assert train(whole)
    with monkeypatch.context() as patch:
        request_stop_at(patch, 5)
        assert not train(parted)
    assert train(parted, attempt=2)
    assert_same_weights(whole, parted)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    whole = make_run(tmp_path, batch_size=32, **KFAC)
    parts = make_run(tmp_path, batch_size=16, accumulate=2, **KFAC)
    assert train(whole)
    assert train(parts)
    for name, value in weights(whole).items():
        # Sums in another order, in float32, over 14 steps.
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=1e-4)


def test_profiling_writes_the_phases(tmp_path: Path) -> None:
    run = make_run(tmp_path, epochs=1, **KFAC, **{"diagnostics.profiling": "true"})
    assert train(run)
    profiling = rows(run, "profiling", rank=0)
    assert {"capture", "reduce", "invert", "precondition", "update"} <= {row["phase"] for row in profiling}
    assert {row["step"] for row in profiling if row["refresh"]} == {1, 4, 7, 10, 13}
    held = {row["kind"]: row["size_bytes"] for row in rows(run, "memory")}
    assert held.keys() == {"factors", "inverses"}
    assert all(size > 0 for size in held.values())
