"""How many samples are kept, the complement of their span, the KL clip, and unbiased importance sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpcsngd.optim import HyLo
from hpcsngd.optim.curvature import SampleCurvature, Sketch
from hpcsngd.optim.selection import RankRule, apportion, draw_rows
from hpcsngd.optim.sketches import Compression
from tests.optim import models, oracle
from tests.optim.test_kid import gradients, problem, projection

DAMPING = 0.05


def stepped(method: str, count: int = 20, **options: Any) -> HyLo:
    model = models.mlp()
    hylo = HyLo(model, method=method, damping=DAMPING, **options)
    oracle.mean_loss(model, *oracle.batch(models.mlp(), (count, 5))).backward()
    hylo.step()
    return hylo


# --- how many


@pytest.mark.parametrize("method", ["kid", "kis"])
@pytest.mark.parametrize(
    ("rule", "count", "kept"),
    [({"ratio": 0.25}, 20, 5), ({"ratio": 0.25}, 12, 3), ({"low_rank": 5}, 20, 5), ({"low_rank": 5}, 12, 5),
     ({"low_rank": 50}, 12, 12)],
)  # fmt: skip
def test_ratio_and_budget(method: str, rule: dict[str, Any], count: int, kept: int) -> None:
    records = stepped(method, count, **rule).diagnostics().kept
    found = [(item.layer, item.method, item.rule, item.samples, item.kept) for item in records]
    name = next(iter(rule))
    assert found == [("0", method, name, count, kept), ("2", method, name, count, kept)]


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_share_is_that_of_the_spectrum(share: float) -> None:
    """KID: the smallest number of eigenvalues of the dense F that reach the share."""
    model, data = models.mlp(), oracle.batch(models.mlp(), (20, 5))
    for item in stepped("kid", share=share).diagnostics().kept:
        rows = oracle.true_gradients(model, dict(model.named_modules())[item.layer], *data)
        values = torch.linalg.svdvals(rows).square()
        assert float(values[: item.kept].sum()) >= share * float(values.sum()) * (1 - 1e-12)
        assert float(values[: item.kept - 1].sum()) < share * float(values.sum())


@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=40)
def test_share_by_scores_keeps_at_least_as_many(seed: int, share: float) -> None:
    """KIS sees the kernel's diagonal only, which never needs fewer samples than the spectrum."""
    rows, _ = problem(seed, 16)
    rule = RankRule(share=share)
    by_scores = rule.rows(16, rows.scores())
    assert by_scores >= rule.rows(16, torch.linalg.eigvalsh(rows.gram()))
    ordered = rows.scores().sort(descending=True).values
    assert float(ordered[:by_scores].sum()) >= share * float(ordered.sum()) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0"),
        ({"ratio": 1.1}, "ratio=1.1"),
        ({"low_rank": 0}, "low_rank=0"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"ratio": 0.5, "low_rank": 3}, "ratio=0.5 and low_rank=3: give one rule"),
        ({"share": 0.5, "low_rank": 3}, "low_rank=3 and share=0.5: give one rule"),
    ],
)
def test_bad_rules_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyLo(models.mlp(), method="kid", **fields)


@given(st.integers(1, 40), st.lists(st.integers(0, 20), min_size=1, max_size=5))
@settings(max_examples=100)
def test_apportion(budget: int, counts: list[int]) -> None:
    shares = apportion(budget, counts)
    total = sum(counts)
    assert sum(shares) == min(budget, total)
    for share, count in zip(shares, counts, strict=True):
        assert share <= count
        # Within one sample of the exact proportion.
        assert abs(share * total - min(budget, total) * count) < max(total, 1)


# --- the complement


@pytest.mark.parametrize("method", ["sngd", "kid", "kis"])
@pytest.mark.parametrize("complement", ["damped", "plain", "residual"])
def test_complement_equals_its_dense_formula(method: str, complement: Any) -> None:
    rows, _ = problem(0, 20)
    grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rule = RankRule() if method == "sngd" else RankRule(low_rank=6)
    sketch = Compression(rule, False, False, "joined", 0).sketch(method, "x", rows, 0, DAMPING)
    found = SampleCurvature.build(sketch, sketch.kernel(), DAMPING, complement).solve(grad).flatten()
    scale = {"damped": 1 / DAMPING, "plain": 1.0, "residual": 1 / (DAMPING + sketch.left_out)}[complement]
    u = gradients(sketch.rows)
    mixed = u if sketch.mixing is None else sketch.mixing.T @ u
    fisher, q = mixed.T @ mixed / sketch.samples, projection(u)
    solved = torch.linalg.solve(fisher + DAMPING * torch.eye(35, dtype=torch.float64), q @ grad.flatten())
    assert oracle.relative_error(found, solved + scale * (grad.flatten() - q @ grad.flatten())) < 1e-9
    assert (sketch.left_out > 0) == (method != "sngd")


@pytest.mark.parametrize("rows", ["equal", "zero"])
def test_complement_of_degenerate_rows(rows: str) -> None:
    """Equal samples span one direction; zero samples none, and the gradient stays plain."""
    some, grad = problem(0, 1)
    all_ = some.take(torch.zeros(6, dtype=torch.int64)).scaled(float(rows == "equal"))
    sketch = Sketch(all_, 6, 6)
    found = SampleCurvature.build(sketch, sketch.kernel(), DAMPING, "plain").solve(grad).flatten()
    u = gradients(all_)
    q = projection(u)
    inside = torch.linalg.solve(u.T @ u / 6 + DAMPING * torch.eye(35).double(), q @ grad.flatten())
    expected = inside + grad.flatten() - q @ grad.flatten()
    assert oracle.relative_error(found, expected) < 1e-9


def test_complement_survives_a_resume() -> None:
    hylo = stepped("kid", ratio=0.25, complement="residual")
    other = HyLo(models.mlp(), method="kid", ratio=0.25, damping=DAMPING)
    other.load_state_dict(hylo.state_dict())
    for name, state in hylo.state_dict()["layers"].items():
        loaded = other.state_dict()["layers"][name]
        assert set(state) == set(loaded) >= {"mixing", "span", "scale"}
        torch.testing.assert_close(loaded, state, rtol=0, atol=0)


def test_residual_complement_overshoots_less() -> None:
    """Low rank and little damping: dividing the unknown by the damping alone is worse (mean of 10)."""
    errors = {"damped": 0.0, "residual": 0.0}
    for seed in range(10):
        rows, grad = problem(seed, 32)
        exact = oracle.dense_solution(gradients(rows), grad, 0.01)
        sketch = Compression(RankRule(low_rank=4), False, False, "joined", 0).sketch(
            "kid", "x", rows, 0, 0.01
        )
        for complement in errors:
            solved = SampleCurvature.build(sketch, sketch.kernel(), 0.01, complement).solve(grad)
            errors[complement] += oracle.relative_error(solved, exact) / 10
    assert errors["residual"] < 0.1 * errors["damped"]


# --- the KL clip


def clipped(lr: float, **options: Any) -> tuple[list[Tensor], float]:
    """Returns the gradients after a step, and lr^2 v . g over the covered layers."""
    model = models.seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)))
    hylo = HyLo(model, damping=DAMPING, **options)
    oracle.mean_loss(model, *oracle.batch(models.mlp(), (8, 5))).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    hylo.set_progress(0.0, lr)
    hylo.step()
    found = [p.grad for p in model.parameters()]
    covered = [0, 1, 4, 5]
    return found, lr**2 * sum(float((found[i] * plain[i]).sum()) for i in covered)


def test_kl_clip_bounds_the_step() -> None:
    free, size = clipped(0.5)
    for limit in (0.1, 0.5):
        found, reached = clipped(0.5, kl_clip=limit * size)
        # The bound is on f^2 v . F v, with F v taken as g.
        factor = limit**0.5
        assert reached == pytest.approx(factor * size)
        for index, (left, right) in enumerate(zip(found, free, strict=True)):
            torch.testing.assert_close(left, right if index in (2, 3) else factor * right)


def test_kl_clip_leaves_small_steps_alone() -> None:
    free, size = clipped(0.5)
    for options in ({"kl_clip": 2 * size}, {"kl_clip": lambda _: 2 * size}):
        for left, right in zip(clipped(0.5, **options)[0], free, strict=True):
            assert torch.equal(left, right)
    for left, right in zip(clipped(0.0, kl_clip=1e-9)[0], free, strict=True):
        assert torch.equal(left, right)


def test_bad_clip_and_choices_are_refused() -> None:
    for options, message in (
        ({"kl_clip": 0.0}, "kl_clip=0.0"),
        ({"complement": "none"}, "complement='none': allowed are damped, plain, residual"),
        ({"kid_scope": "rank"}, "kid_scope='rank': allowed are joined, local"),
    ):
        with pytest.raises(ValueError, match=message):
            HyLo(models.mlp(), **options)


# --- unbiased importance sampling


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_weights_are_unbiased(keep: int) -> None:
    """The mean of the weighted Gram's F over many draws is SNGD's F, within five standard errors."""
    rows, _ = problem(0, 10, d_in=3, d_out=2)
    u = gradients(rows)
    exact = u.T @ u / 10
    compression = Compression(RankRule(low_rank=keep), False, True, "joined", 7)
    draws = []
    for step in range(4000):
        sketch = compression.sketch("kis", "x", rows, step, DAMPING)
        kept = gradients(sketch.rows)
        draws.append(kept.T @ kept / sketch.samples)
    found = torch.stack(draws)
    standard_error = found.std(0) / len(draws) ** 0.5
    assert bool(((found.mean(0) - exact).abs() <= 5 * standard_error + 1e-12).all())
    # Published KIS is not: it is biased towards the large samples.
    plain = Compression(RankRule(low_rank=keep), False, False, "joined", 7)
    traces = [float(plain.sketch("kis", "x", rows, step, DAMPING).kernel().trace()) for step in range(500)]
    assert sum(traces) / 500 > 1.02 * float(exact.trace())


def test_weights_tend_to_one_over_k_p() -> None:
    scores = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = draw_rows(scores, 200, seed=0, step=0, layer="x")
    simple = scores.sum() / (200 * scores[draw.rows])
    # The threshold estimates k / sum of scores with a relative error of 1 / sqrt(k).
    torch.testing.assert_close(draw.weight, simple, rtol=4 / 200**0.5, atol=0)


def test_unbiased_at_ratio_one_is_sngd() -> None:
    left, right = stepped("kis", unbiased=True).state_dict(), stepped("sngd").state_dict()
    for name, layer in left["layers"].items():
        assert torch.equal(layer["factor"], right["layers"][name]["factor"])


@pytest.mark.parametrize("unbiased", [False, True])
def test_fewer_rows_than_asked_are_fine(unbiased: bool) -> None:
    """Three samples of twelve have a gradient, six are asked for: F is theirs."""
    rows, grad = problem(0, 12)
    silent = rows.scaled((torch.arange(12) % 4 == 0).double())
    compression = Compression(RankRule(low_rank=6), False, unbiased, "joined", 0)
    sketch = compression.sketch("kis", "x", silent, 0, DAMPING)
    found = SampleCurvature.build(sketch, sketch.kernel(), DAMPING).solve(grad)
    # Unbiased: the batch has 12 samples. Published: as if the six drawn were the batch.
    scale = 12 / (12 if unbiased else 6)
    expected = oracle.dense_solution(gradients(silent) * scale**0.5, grad, DAMPING)
    assert oracle.relative_error(found, expected) < 1e-9
