"""P ranks equal one process on the joined batch, whatever the shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsngd.optim.linalg import pivoted_cholesky
from tests.optim import models, oracle, training
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.dist

# Sums are taken in another order on several ranks: rounding, amplified by the kernel's condition number.
TOLERANCE = 1e-9

OPTIONS: dict[str, dict[str, Any]] = {
    "sngd": {"damping": 0.05},
    "kis": {"damping": 0.05, "method": "kis", "ratio": 0.4, "seed": 3},
    "staggered": {"damping": 0.05, "refresh_every": 2, "stagger": True},
    "exact": {"damping": 0.05, "conv_mode": "exact"},
    "exact kis": {"damping": 0.05, "conv_mode": "exact", "method": "kis", "ratio": 0.4, "seed": 3},
    "unbiased": {"damping": 0.05, "method": "kis", "low_rank": 5, "seed": 3, "unbiased": True},
    "kid": {"damping": 0.05, "method": "kid", "low_rank": 5, "residual": True},
    "share": {"damping": 0.05, "method": "kid", "share": 0.8, "complement": "residual"},
    "local": {"damping": 0.05, "method": "kid", "ratio": 1.0, "kid_scope": "local", "residual": True},
}


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for left, right in zip(found, expected, strict=True):
        assert oracle.relative_error(left, right) <= tolerance


@pytest.mark.parametrize(
    ("kind", "sizes", "method"),
    [
        ("mlp", [12], "kis"),
        ("mlp", [6, 6], "sngd"),
        ("mlp", [3, 7, 2], "kis"),
        ("mlp", [5, 0, 6, 1], "sngd"),
        ("conv", [6, 6], "kis"),
        ("conv", [3, 7, 2], "sngd"),
        ("conv", [5, 0, 6, 1], "kis"),
        ("conv", [3, 7, 2], "staggered"),
        ("conv", [3, 7, 2], "exact"),
        ("conv", [5, 0, 6, 1], "exact kis"),
        ("tokens", [3, 7], "exact"),
        ("mlp", [6, 6], "share"),
        ("conv", [3, 7, 2], "kid"),
        ("mlp", [5, 0, 6, 1], "kid"),
        ("conv", [3, 7, 2], "unbiased"),
        # Full rank, where local decisions change nothing.
        ("mlp", [5, 0, 6, 1], "local"),
    ],
    ids=str,
)
def test_ranks_equal_one_process(kind: str, sizes: list[int], method: str) -> None:
    expected = training.train(kind, [sum(sizes)], 3, OPTIONS[method])
    results = run_on_ranks(training.train, len(sizes), kind, sizes, 3, OPTIONS[method])
    for result in results:
        same(result["gradients"], expected["gradients"])
        # Every rank has exactly the same result: replicas do not drift apart.
        same(result["gradients"], results[0]["gradients"], tolerance=0)


@pytest.mark.parametrize("options", [{}, {"method": "kis", "ratio": 0.5}], ids=["sngd", "kis"])
@pytest.mark.parametrize("lengths", [[1, 2], [2, 9, 1], [9, 8]], ids=str)
def test_sequences_of_other_lengths_on_every_rank(lengths: list[int], options: dict[str, Any]) -> None:
    """Some ranks keep factors, some matrices: they agree on one form."""
    options = {"conv_mode": "exact", **options}
    expected = training.step_on_sequences(lengths, options)["gradients"]
    for result in run_on_ranks(training.step_on_sequences, len(lengths), lengths, options):
        same(result["gradients"], expected)


def test_bytes_of_exact_rows() -> None:
    """Layers of 4 x 6 and 3 x 5 entries: one token is a pair of vectors, two are already a matrix."""
    options = {"conv_mode": "exact", "placement": "replicate"}
    for length, width in {1: 6 + 4, 2: 6 * 4, 9: 6 * 4}.items():
        results = run_on_ranks(training.step_on_sequences, 2, [length, length], options)
        counted = {(item.phase, item.op): item.size_bytes for item in results[0]["record"].communication}
        assert counted["gather", "all_gather"] == 2 * 16 + 3 * (width + 5 + 3) * 8


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (2, 2), (4, 2)])
def test_ddp_with_default_scale(ranks: int, micro_batches: int) -> None:
    expected = training.train_with_ddp(3, 1)
    for result in run_on_ranks(training.train_with_ddp, ranks, 3, micro_batches):
        same(result, expected)


def test_kis_keeps_the_same_samples_on_every_rank() -> None:
    first, *others = run_on_ranks(training.train, 3, "mlp", [3, 7, 2], 2, OPTIONS["kis"])
    for other in others:
        for name, layer in first["state"]["hylo"]["layers"].items():
            assert [len(tensor) for tensor in layer["rows"]] == [5, 5]
            for mine, theirs in zip(
                layer["rows"], other["state"]["hylo"]["layers"][name]["rows"], strict=True
            ):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4]], ids=str)
def test_resume_on_another_number_of_ranks(sizes: list[int]) -> None:
    options = {**OPTIONS["kis"], "refresh_every": 3}
    expected = training.train("mlp", [12], 6, options)
    (saved, _) = run_on_ranks(training.train, 2, "mlp", [5, 7], 4, options)
    resumed = run_on_ranks(training.train, len(sizes), "mlp", sizes, 6, options, saved["state"])
    for result in resumed:
        same(result["gradients"], expected["gradients"])


def blockwise(sizes: list[int], kept: list[int], rows: Tensor, grad: Tensor, damping: float) -> Tensor:
    """Returns the documented result of local KID: ``F = sum_p Q_p F_p Q_p``, Q_p on rank p's kept rows."""
    fisher = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
    for own, rank in zip(rows.split(sizes), kept, strict=True):
        pivots, _ = pivoted_cholesky(own @ own.T, rank)
        q = torch.linalg.pinv(own[pivots]) @ own[pivots]
        fisher += q @ own.T @ own @ q / len(rows)
    identity = torch.eye(len(fisher), dtype=rows.dtype)
    return torch.linalg.solve(fisher + damping * identity, grad.flatten()).reshape(grad.shape)


@pytest.mark.parametrize(
    ("sizes", "rule", "kept"),
    [
        ([12], {"ratio": 0.5}, [6]),
        ([6, 6], {"ratio": 0.5}, [3, 3]),
        ([3, 7, 2], {"low_rank": 6}, [2, 3, 1]),
        ([5, 0, 6, 1], {"low_rank": 4}, [2, 0, 2, 0]),
    ],
    ids=str,
)
def test_local_kid_equals_its_formula(sizes: list[int], rule: dict[str, Any], kept: list[int]) -> None:
    options = {"damping": 0.05, "method": "kid", "kid_scope": "local", **rule}
    model, data = models.mlp(), oracle.batch(models.mlp(), (12, 5), seed=0)
    oracle.mean_loss(model, *data).backward()
    expected = []
    for layer in (model[0], model[2]):
        rows = oracle.true_gradients(model, layer, *data)
        expected.append(blockwise(sizes, kept, rows, oracle.layer_gradient(layer), 0.05))
    for result in run_on_ranks(training.train, len(sizes), "mlp", sizes, 1, options):
        weights = [torch.cat([w.flatten(), b]) for w, b in zip(*[iter(result["gradients"])] * 2, strict=True)]
        same(weights, expected)
        assert [item.kept for item in result["records"][0].kept] == [sum(kept)] * 2


def test_hybrid_decides_alike_on_every_rank() -> None:
    one = training.train_hybrid([12], 12)
    for result in run_on_ranks(training.train_hybrid, 3, [3, 7, 2], 12):
        assert result["methods"] == one["methods"]
        assert {"kid", "kis"} == set(one["methods"])
        assert result["changes"] == pytest.approx(one["changes"], rel=1e-6, nan_ok=True)
        same(result["gradients"], one["gradients"])


@pytest.mark.parametrize(("fault", "layers"), [("rows", 1), ("kernel", 2)])
def test_a_fault_on_one_rank_is_everybodys(fault: str, layers: int) -> None:
    results = run_on_ranks(training.train_through_a_fault, 2, 3, fault)
    assert [result["failures"] for result in results] == [layers, layers]
    for left, right in zip(results[0]["gradients"], results[1]["gradients"], strict=True):
        same(left, right, tolerance=0)
        assert all(bool(gradient.isfinite().all()) for gradient in left)


def test_bytes_are_counted() -> None:
    sizes = [3, 7, 2]
    layers = [(6, 6), (7, 3)]
    widths = sum(d_in + d_out for d_in, d_out in layers)
    for method, keep in (("sngd", None), ("kid", None), ("kis", 5)):
        records = [
            run["records"]
            for run in run_on_ranks(
                training.train,
                3,
                "mlp",
                sizes,
                2,
                {**OPTIONS[method], "refresh_every": 2, "placement": "replicate"},
            )
        ]
        refresh, plain = records[0]
        counted = {(item.phase, item.op): (item.calls, item.size_bytes) for item in refresh.communication}
        assert plain.communication == ()
        assert counted["factorise", "all_reduce"] == (1, 2 * 8)
        calls, size = counted["gather", "all_gather"]
        if keep is None:
            # Row counts and terms, then the rows, padded to the largest share.
            assert (calls, size) == (2, 2 * 16 + 7 * widths * 8)
        else:
            # Row counts and terms, scores, then kept rows only: at most all five from one rank.
            assert calls == 3
            assert 2 * 16 + 7 * 2 * 8 < size <= 2 * 16 + 7 * 2 * 8 + keep * widths * 8


def test_bytes_of_local_kid() -> None:
    """Counts, terms, kept counts, then rows, mixing and one number per layer, padded to the largest."""
    options = {"damping": 0.05, "method": "kid", "kid_scope": "local", "ratio": 0.5}
    for run in run_on_ranks(training.train, 3, "mlp", [3, 7, 2], 1, options):
        counted = {
            (item.phase, item.op): (item.calls, item.size_bytes) for item in run["records"][0].communication
        }
        largest = sum(4 * (d_in + d_out) + 4 * 4 + 1 for d_in, d_out in [(6, 6), (7, 3)])
        assert counted["gather", "all_gather"] == (3, 2 * 16 + 2 * 8 + largest * 8)


def test_verify_needs_no_other_rank() -> None:
    found, nothing = run_on_ranks(training.verify_on_one_rank, 2)
    assert nothing == []
    assert len(found) == 2
    assert max(found) < 1e-10
