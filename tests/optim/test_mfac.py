"""M-FAC against the explicit inverse, GGT against the explicit matrix root; float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsngd.optim.ggt import GGT
from hpcsngd.optim.mfac import MFAC
from hpcsngd.optim.quantify import SAMPLED_ENTRIES, quantify
from hpcsngd.optim.shard import cut_evenly
from hpcsngd.optim.windowed import Windowed
from tests.ranks import run_on_ranks

DAMPING = 0.05
SHAPES = [(4, 3), (4,), (2, 4), (2,)]
SIZE = 26


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]


def set_gradient(params: list[nn.Parameter], vector: Tensor) -> None:
    start = 0
    for parameter in params:
        parameter.grad = vector[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()


def read_gradient(params: list[nn.Parameter]) -> Tensor:
    gradients = [parameter.grad for parameter in params]
    return torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])


def stepped(method: Windowed, params: list[nn.Parameter], gradient: Tensor) -> Tensor:
    set_gradient(params, gradient)
    method.step()
    return read_gradient(params)


def gradients(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(count)]


def fisher_solution(window: list[Tensor], divisor: int, vector: Tensor, damping: float = DAMPING) -> Tensor:
    matrix = damping * torch.eye(SIZE, dtype=torch.float64)
    for row in window:
        matrix += torch.outer(row, row) / divisor
    return torch.linalg.inv(matrix) @ vector


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("rule", ["window", "count"])
@pytest.mark.parametrize("m", [1, 5, 33, 40])
def test_dense_equals_the_explicit_inverse(m: int, rule: Any) -> None:
    """While filling, when full and after wrapping; also with more gradients than entries."""
    params = parameters()
    method = MFAC(params, m, damping=DAMPING, scale_rule=rule)
    seen: list[Tensor] = []
    for gradient in gradients(2 * m + 3):
        seen = [*seen, gradient][-m:]
        found = stepped(method, params, gradient)
        divisor = m if rule == "window" else len(seen)
        assert relative(found, fisher_solution(seen, divisor, gradient)) < 1e-10
        assert relative(DAMPING * found, gradient) > 0.02


def test_a_tiny_damping_loses_no_digits() -> None:
    """The window form does not cancel: in float32 it keeps what ``(x - G^T c) / damping`` would lose."""
    params = [nn.Parameter(torch.zeros(SIZE))]
    method = MFAC(params, 4, damping=1e-7)
    window = gradients(4)
    for gradient in window:
        params[0].grad = gradient.float()
        method.step()
    exact = fisher_solution([row.float().double() for row in window], 4, window[-1].float().double(), 1e-7)
    assert params[0].grad is not None
    assert relative(params[0].grad.double(), exact) < 1e-4


def test_the_whole_gradient_with_products_of_its_own() -> None:
    params = parameters()
    method = MFAC(params, 6, damping=DAMPING, storage="sparse", density=0.25, target="gradient")
    for gradient in gradients(9):
        found = stepped(method, params, gradient)
        history = method._store.history
        window = [history.row(slot) for slot in range(method._ring.count)]
        assert relative(found, fisher_solution(window, 6, gradient)) < 1e-10


@pytest.mark.parametrize("entries", ["fp32+int32", "fp32+int16"])
@pytest.mark.parametrize("scope", ["block", "layer", "global"])
def test_sparse_that_keeps_everything_is_dense(scope: Any, entries: Any) -> None:
    params, twins = parameters(), parameters()
    sparse = MFAC(
        params, 5, damping=DAMPING, storage="sparse", density=1.0, scope=scope, entries=entries, block_size=7
    )
    dense = MFAC(twins, 5, damping=DAMPING)
    for gradient in gradients(12):
        assert relative(stepped(sparse, params, gradient), stepped(dense, twins, gradient)) < 1e-12


def test_sparse_preconditions_what_was_sent_by_what_was_sent() -> None:
    params = parameters()
    method = MFAC(params, 4, damping=DAMPING, storage="sparse", density=0.2, block_size=10)
    for gradient in gradients(10):
        found = stepped(method, params, gradient)
        window = [method._store.history.row(slot) for slot in range(method._ring.count)]
        sent = window[method._ring.newest]
        assert int((sent != 0).sum()) == 2 + 2 + 2
        assert relative(found, fisher_solution(window, 4, sent)) < 1e-10


def test_bytes_of_the_formats() -> None:
    sizes = {}
    for entries in ("fp32+int32", "fp32+int16", "bf16+int16"):
        model = nn.Linear(100, 100)
        method = MFAC(model, 8, storage="sparse", density=0.1, entries=entries, block_size=1000)
        kept = 10 * 100 + 10
        held = method._store.memory()
        sizes[entries] = held["window"] / (8 * kept)
        assert held["error"] == 4 * 10_100
    assert sizes == {"fp32+int32": 8.0, "fp32+int16": 6.0, "bf16+int16": 4.0}
    dense = MFAC(nn.Linear(100, 100), 8)
    assert dense._store.memory() == {"window": 4 * 8 * 10_100, "error": 0}


def test_early_remedies_fill_the_zeros() -> None:
    gradient = gradients(1)[0]
    found = {}
    for early in ("none", "gradient", "error", "dense"):
        params = parameters()
        method = MFAC(params, 3, damping=DAMPING, storage="sparse", density=0.1, early=early)
        found[early] = stepped(method, params, gradient)
        if early == "error":
            assert method._store.error is not None
            assert float(method._store.error.abs().max()) == 0
    empty = found["none"] == 0
    assert int(empty.sum()) == SIZE - 3
    for early in ("gradient", "error"):
        assert torch.equal(found[early][~empty], found["none"][~empty])
        assert torch.allclose(found[early][empty], gradient[empty] / DAMPING)
    sent = torch.where(empty, torch.zeros_like(gradient), gradient)
    assert relative(found["dense"], fisher_solution([sent], 3, gradient)) < 1e-10


def test_remedies_end_when_the_window_is_full() -> None:
    params, twins = parameters(), parameters()
    options: dict[str, Any] = {"damping": DAMPING, "storage": "sparse", "density": 0.1}
    helped, plain = MFAC(params, 2, early="gradient", **options), MFAC(twins, 2, **options)
    for index, gradient in enumerate(gradients(4)):
        one, other = stepped(helped, params, gradient), stepped(plain, twins, gradient)
        assert torch.equal(one, other) == (index >= 1)


def test_low_rank_of_full_rank_is_dense_and_of_less_is_its_own_window() -> None:
    params, twins = parameters(), parameters()
    full = MFAC(params, 4, damping=DAMPING, storage="lowrank", low_rank=4)
    dense = MFAC(twins, 4, damping=DAMPING)
    for gradient in gradients(7):
        assert relative(stepped(full, params, gradient), stepped(dense, twins, gradient)) < 1e-11
    method = MFAC(params, 4, damping=DAMPING, storage="lowrank", low_rank=1)
    for gradient in gradients(9):
        found = stepped(method, params, gradient)
        window = [method._store.history.row(slot) for slot in range(method._ring.count)]
        exact = fisher_solution(window, 4, window[method._ring.newest])
        assert relative(found, exact) < 1e-10
    assert method._store.error is not None
    assert float(method._store.error.norm()) > 0


def test_products_of_factors_are_those_of_the_rows() -> None:
    params = parameters()
    method = MFAC(params, 5, damping=DAMPING, storage="lowrank", low_rank=1)
    for gradient in gradients(5):
        stepped(method, params, gradient)
    history = method._store.history
    rows = torch.stack([history.row(slot) for slot in range(5)])
    assert torch.allclose(torch.stack([history.inner(slot, 5) for slot in range(5)]), rows @ rows.T)
    vector = gradients(1, seed=9)[0]
    assert torch.allclose(history.products(vector, 5), rows @ vector)


def test_coupled_weight_decay_is_preconditioned_and_not_stored() -> None:
    params = parameters()
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in params])
    method = MFAC(params, 3, damping=DAMPING, weight_decay=0.1)
    window: list[Tensor] = []
    for gradient in gradients(5):
        window = [*window, gradient][-3:]
        found = stepped(method, params, gradient)
        assert relative(found, fisher_solution(window, 3, gradient + 0.1 * weights)) < 1e-10


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_ggt_stores_and_preconditions_coupled_weight_decay(storage: Any) -> None:
    params, twins = parameters(), parameters()
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in params])
    decayed = GGT(params, 3, weight_decay=0.1, storage=storage, density=0.4)
    plain = GGT(twins, 3, storage=storage, density=0.4)
    for gradient in gradients(5):
        expected = stepped(plain, twins, gradient + 0.1 * weights)
        assert relative(stepped(decayed, params, gradient), expected) < 1e-12


def test_clipping() -> None:
    gradient = gradients(1)[0]
    plain = stepped(MFAC(params := parameters(), 3, damping=DAMPING), params, gradient)
    by_norm = stepped(MFAC(params := parameters(), 3, damping=DAMPING, clip_norm=0.1), params, gradient)
    assert float(by_norm.norm()) == pytest.approx(0.1)
    assert torch.allclose(by_norm, 0.1 * plain / plain.norm())
    by_value = stepped(MFAC(params := parameters(), 3, damping=DAMPING, clip_value=0.05), params, gradient)
    assert torch.equal(by_value, plain.clamp(-0.05, 0.05))
    loose = stepped(MFAC(params := parameters(), 3, damping=DAMPING, clip_norm=1e9), params, gradient)
    assert torch.equal(loose, plain)


def test_damping_by_steps() -> None:
    params = parameters()
    method = MFAC(params, 3, damping=lambda step: 1.0 / (step + 1))
    window: list[Tensor] = []
    for index, gradient in enumerate(gradients(4)):
        window = [*window, gradient][-3:]
        exact = fisher_solution(window, 3, gradient, 1.0 / (index + 1))
        assert relative(stepped(method, params, gradient), exact) < 1e-10


def test_zero_and_broken_gradients() -> None:
    params = parameters()
    method = MFAC(params, 3, damping=DAMPING)
    assert float(stepped(method, params, torch.zeros(SIZE, dtype=torch.float64)).norm()) == 0
    good, bad = gradients(1)[0], torch.full((SIZE,), float("nan"), dtype=torch.float64)
    assert stepped(method, params, bad).isnan().all()
    record = method.diagnostics()
    assert (record.failures, record.fallbacks[0].reason) == (1, "the gradient is not finite")
    window = [torch.zeros(SIZE, dtype=torch.float64), good]
    assert relative(stepped(method, params, good), fisher_solution(window, 3, good)) < 1e-10


def test_modules_that_are_skipped_keep_training_with_their_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    method = MFAC(model, 4, damping=DAMPING, skip=["BatchNorm1d"])
    assert set(method.skipped) == {"1.weight", "1.bias"}
    covered = {span.name for span in method._flat.spans}
    assert covered | set(method.skipped) == {name for name, _ in model.named_parameters()}
    model(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    method.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name]) == (name in method.skipped)


def test_a_parameter_without_gradient_keeps_none() -> None:
    params = parameters()
    method = MFAC(params, 3, damping=DAMPING)
    set_gradient(params, gradients(1)[0])
    params[1].grad = None
    method.step()
    assert params[1].grad is None
    assert params[0].grad is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_grads": 0}, "num_grads=0"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"storage": "tiny"}, "storage='tiny'"),
        ({"storage": "sparse", "entries": "int8"}, "entries='int8'"),
        ({"scale_rule": "mean"}, "scale_rule='mean'"),
        ({"early": "dense"}, "sparse storage"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"skip": ["BatchNorm2d"]}, "needs the model"),
        ({"storage": "lowrank", "low_rank": 0}, "low_rank=0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MFAC(parameters(), **arguments)


def root_solution(window: list[Tensor], ages: list[int], beta1: float, beta2: float, eps: float) -> Tensor:
    """The definition of `GGT` with the d x d matrix and its root formed."""
    matrix = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    mean = torch.zeros(SIZE, dtype=torch.float64)
    for row, age in zip(window, ages, strict=True):
        matrix += beta2 ** (2 * age) * torch.outer(row, row)
        mean += ((1 - beta1) * beta1**age if beta1 else float(age == 0)) * row
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.mT
    return torch.linalg.solve(root + eps * torch.eye(SIZE, dtype=torch.float64), mean)


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 1.0), (0.0, 0.9), (0.9, 1.0), (0.8, 0.95)])
def test_ggt_equals_the_explicit_root(beta1: float, beta2: float, storage: Any) -> None:
    params = parameters()
    method = GGT(params, 6, beta1=beta1, beta2=beta2, eps=0.01, storage=storage, density=0.5)
    for gradient in gradients(15):
        found = stepped(method, params, gradient)
        ages = method._ring.ages().tolist()
        window = [method._store.history.row(slot) for slot in range(method._ring.count)]
        exact = root_solution(window, ages, beta1, beta2, 0.01)
        # the oracle's own root of a singular d x d matrix is good to about 1e-8 of its largest entry
        assert relative(found, exact) < 1e-6
        assert relative(0.01 * found, gradient) > 0.1


def test_the_first_step_of_ggt_normalizes() -> None:
    params = parameters()
    gradient = gradients(1)[0]
    found = stepped(GGT(params, 5, beta1=0.0, eps=1e-3), params, gradient)
    assert relative(found, gradient / (gradient.norm() + 1e-3)) < 1e-12


def test_a_repeated_gradient_makes_a_singular_window() -> None:
    params = parameters()
    method = GGT(params, 5, beta1=0.0, beta2=1.0, eps=1e-8)
    gradient = gradients(1)[0]
    for count in range(1, 4):
        found = stepped(method, params, gradient)
        assert relative(found, gradient / (count**0.5 * gradient.norm() + 1e-8)) < 1e-6


def test_sparse_ggt_that_keeps_everything_is_ggt() -> None:
    params, twins = parameters(), parameters()
    sparse, dense = GGT(params, 4, storage="sparse", density=1.0), GGT(twins, 4)
    for gradient in gradients(9):
        assert relative(stepped(sparse, params, gradient), stepped(dense, twins, gradient)) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": 0.5}, "at least beta1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"storage": "lowrank"}, "storage='lowrank'"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_what_ggt_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GGT(parameters(), **arguments)


METHODS: dict[str, Callable[[list[nn.Parameter]], Windowed]] = {
    "dense": lambda params: MFAC(params, 4, damping=DAMPING),
    "sparse": lambda params: MFAC(
        params, 4, damping=DAMPING, storage="sparse", density=0.2, entries="bf16+int16", dtype=torch.float32
    ),
    "lowrank": lambda params: MFAC(params, 4, damping=DAMPING, storage="lowrank"),
    "ggt": lambda params: GGT(params, 4),
    "sparse ggt": lambda params: GGT(params, 4, storage="sparse", density=0.2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("phase", [0, 1, 3, 4, 6])
def test_resume_is_bit_for_bit(name: str, phase: int) -> None:
    params, twins = parameters(), parameters()
    whole, resumed = METHODS[name](params), METHODS[name](twins)
    stream = gradients(phase + 4)
    for gradient in stream[:phase]:
        stepped(whole, params, gradient)
    state = whole.state_dict()
    for gradient in stream[phase:]:  # the state must be a copy
        stepped(whole, params, gradient)
    resumed.load_state_dict(state)
    for gradient in stream[phase:]:
        stepped(resumed, twins, gradient)
    assert torch.equal(read_gradient(params), read_gradient(twins))
    assert same(whole.state_dict(), resumed.state_dict())


def test_the_state_is_plain_data(tmp_path: Any) -> None:
    params = parameters()
    method = METHODS["lowrank"](params)
    stepped(method, params, gradients(1)[0])
    torch.save(method.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(loaded, method.state_dict())


def test_states_of_others_are_refused() -> None:
    state = MFAC(parameters(), 4).state_dict()
    for other in (GGT(parameters(), 4), MFAC(parameters(), 5), MFAC(parameters()[:2], 4)):
        with pytest.raises(ValueError, match="the state has"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="the state has values of shape None"):
        MFAC(parameters(), 4, storage="sparse").load_state_dict(state)


@pytest.mark.parametrize("name", METHODS)
def test_verify_finds_the_equation_solved_and_more_than_damping(name: str) -> None:
    params = parameters()
    method = METHODS[name](params)
    batch = (torch.zeros(1), torch.zeros(1))
    assert method.verify(batch, nn.functional.mse_loss)[0].skipped == "the window is empty"
    for gradient in gradients(6):
        stepped(method, params, gradient)
    before = method.state_dict()
    (check,) = method.verify(batch, nn.functional.mse_loss)
    assert check.error < (1e-5 if name == "sparse" else 1e-8)
    assert check.strength > 0.1
    assert same(method.state_dict(), before)


def test_records() -> None:
    params = parameters()
    method = MFAC(params, 3, damping=DAMPING, profile=True)
    for gradient in gradients(3):
        stepped(method, params, gradient)
    record = method.diagnostics()
    assert (record.step, record.damping, record.failures) == (3, DAMPING, 0)
    assert {item.kind: item.size_bytes for item in record.memory} == {
        "window": 8 * 3 * SIZE,
        "error": 0,
        "gram": 8 * 9,
    }
    assert {item.phase for item in record.phases} >= {"compress", "products", "factorise", "precondition"}


def test_scaling_and_rotation() -> None:
    g, u = gradients(2)
    found = quantify(g, u)
    assert found.norm_ratio == pytest.approx(float(u.norm() / g.norm()))
    cosine = torch.nn.functional.cosine_similarity(u, g, dim=0)
    assert found.cosine == pytest.approx(float(cosine))
    assert found.angle_deg == pytest.approx(float(torch.rad2deg(torch.acos(cosine))))
    quartiles = (u / g).abs().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert (found.q25, found.q50, found.q75) == pytest.approx(tuple(quartiles.tolist()))
    assert found.entries == SIZE


def test_scaling_where_gradients_are_zero() -> None:
    g = torch.tensor([0.0, 2.0, 0.0, -1.0])
    found = quantify(g, 3 * g)
    assert (found.q25, found.q50, found.q75, found.entries) == (3, 3, 3, 2)
    assert found.angle_deg == pytest.approx(0, abs=1e-5)
    nothing = quantify(torch.zeros(4), g)
    assert nothing.entries == 0
    assert all(map(math.isnan, (nothing.q50, nothing.cosine, nothing.angle_deg, nothing.norm_ratio)))


def test_quartiles_of_long_vectors_are_of_a_sample() -> None:
    g = torch.ones(3 * SAMPLED_ENTRIES)
    found = quantify(g, torch.arange(len(g)) / len(g))
    assert found.entries == SAMPLED_ENTRIES
    assert found.q50 == pytest.approx(0.5, abs=1e-4)


def test_a_closed_preconditioner_does_nothing_more() -> None:
    method = MFAC(parameters(), 3)
    method.close()
    with pytest.raises(RuntimeError, match="closed"):
        method.step()


def shared_steps(name: str, count: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """Steps on the same gradients on every rank; DistributedDataParallel has averaged them by then."""
    params = parameters()
    method = METHODS[name](params)
    if state is not None:
        method.load_state_dict(state)
    start = 0 if state is None else int(state["step"])
    for gradient in gradients(count)[start:]:
        found = stepped(method, params, gradient)
    record = method.diagnostics()
    return {
        "found": found,
        "state": method.state_dict(),
        "traffic": {(sent.phase, sent.op): (sent.calls, sent.size_bytes) for sent in record.communication},
        "memory": {held.kind: held.size_bytes for held in record.memory},
        "error": method.verify((torch.zeros(1), torch.zeros(1)), nn.functional.mse_loss)[0].error,
    }


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_ranks_share_the_window_of_one_process(name: str, ranks: int) -> None:
    alone = shared_steps(name, 7, None)
    results = run_on_ranks(shared_steps, ranks, name, 7, None)
    for result in results:
        assert relative(result["found"], alone["found"]) < (1e-5 if name == "sparse" else 1e-9)
        assert result["error"] < 1e-5
        assert result["state"]["store"].keys() == alone["state"]["store"].keys()
    window = sum(result["memory"]["window"] for result in results)
    assert window == alone["memory"]["window"]
    assert alone["traffic"] == {}
    # a rank's part of the vector is what is left after cutting evenly; all send as much as the largest
    number = 4 if name == "sparse" else 8
    parts = {"sparse": SIZE, "sparse ggt": SIZE, "lowrank": max(map(len, lowrank_parts(ranks)))}
    largest = parts.get(name, -(-SIZE // ranks))
    assert results[0]["traffic"] == {
        ("products", "all_reduce"): (1, 8 * 4),
        ("update", "all_gather"): (1, number * largest),
    }


def lowrank_parts(ranks: int) -> list[range]:
    boundaries = [0, 12, 16, 24, 26]
    return [range(*pair) for pair in itertools.pairwise(cut_evenly(boundaries, ranks))]


@pytest.mark.dist
@pytest.mark.parametrize("name", METHODS)
def test_a_state_continues_on_another_number_of_ranks(name: str) -> None:
    whole = shared_steps(name, 8, None)["found"]
    state = run_on_ranks(shared_steps, 3, name, 5, None)[0]["state"]
    assert relative(shared_steps(name, 8, state)["found"], whole) < (1e-5 if name == "sparse" else 1e-9)
    for result in run_on_ranks(shared_steps, 2, name, 8, state):
        assert relative(result["found"], whole) < (1e-5 if name == "sparse" else 1e-9)
