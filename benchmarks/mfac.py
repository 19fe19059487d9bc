"""What M-FAC and GGT cost over SGD: CPU time of a step, bytes of state, and how close to the memory's speed.

Run: ``python -m benchmarks.mfac [--quick] [--parts time state kernels factor] [--model resnet32]``.

Time. Every case trains its own copy of the model beside a plain SGD copy, in one process, step by step in
turn; its window is full. ``whole step`` is the median ratio of CPU seconds of all threads; ``own time`` is 1
plus the CPU time inside the method's own phases over an SGD step, the figure to trust on a noisy machine.

State. Bytes that the method reports to hold, beside the formula: dense ``4 m d``, sparse ``b m k + 4 d``, low
rank ``4 m rank sum(n_1 + n_2) + 4 d``, and always ``8 m^2``. M-FAC of more than 256 gradients keeps a factor
besides, at most ``8 m^2``, which is zero in the first step and in no state.

Kernels. The two passes over the window (scalar products ``G x`` and linear combination ``G^T c``): bytes that
must move, over the time it takes, beside the speed of a plain copy of as much memory, in one run.

Factor. A solve with m x m after one row has changed: the Cholesky factorization from scratch, the factor that
is kept in blocks (mean over a few blocks), and the factor updated by two rank-1 changes of m steps each.
"""

from __future__ import annotations

import os

# libgomp's threads otherwise spin while they wait, which counts as CPU time; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd.optim import stopwatch
from hpcsngd.optim.factor import BLOCK, RingFactor
from hpcsngd.optim.ggt import GGT
from hpcsngd.optim.mfac import MFAC
from hpcsngd.optim.window import Ring, solve_shifted
from hpcsngd.optim.windowed import Windowed
from hpcsngd.train import models

MODELS = ("resnet20", "resnet32")
CASES: dict[str, Callable[[nn.Module], Windowed]] = {
    "dense m=128": lambda model: MFAC(model, 128, profile=True),
    "dense m=1024": lambda model: MFAC(model, 1024, profile=True),
    "sparse 1% m=128": lambda model: MFAC(model, 128, storage="sparse", profile=True),
    "sparse 1% m=1024": lambda model: MFAC(model, 1024, storage="sparse", profile=True),
    "sparse 1% m=1024, 4 B": lambda model: MFAC(
        model, 1024, storage="sparse", entries="bf16+int16", profile=True
    ),
    "sparse 10% m=128": lambda model: MFAC(model, 128, storage="sparse", density=0.1, profile=True),
    "low rank 1 m=128": lambda model: MFAC(model, 128, storage="lowrank", profile=True),
    "low rank 4 m=128": lambda model: MFAC(model, 128, storage="lowrank", low_rank=4, profile=True),
    "ggt r=128": lambda model: GGT(model, 128, profile=True),
    "sparse ggt 1% r=128": lambda model: GGT(model, 128, storage="sparse", profile=True),
}
PARTS = ("time", "state", "kernels", "factor")


class Trainer:
    """A model in training on one fixed batch of noise, with a method or without."""

    def __init__(self, model: str, case: str | None, batch: int) -> None:
        torch.manual_seed(0)
        self.model = models.build_model(model, 10, 3, 32)
        self.x = torch.randn(batch, 3, 32, 32)
        self.target = torch.randint(0, 10, (batch,))
        self.method = None if case is None else CASES[case](self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def fill(self) -> None:
        """Fills the window with noise, as large as gradients are."""
        if self.method is not None:
            for _ in range(self.method.capacity):
                for parameter in self.model.parameters():
                    parameter.grad = 1e-3 * torch.randn_like(parameter)
                self.method.step()

    def step(self) -> tuple[float, float]:
        """Trains one step; returns the CPU seconds of it and of the method's phases in it."""
        begin, inside = time.process_time(), 0.0
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.target).backward()  # type: ignore[no-untyped-call]
        if self.method is not None:
            self.method.step()
            inside = sum(phase.seconds for phase in self.method.diagnostics().phases)
        self.optimizer.step()
        return time.process_time() - begin, inside


def print_times(model: str, cases: list[str], rounds: int, batch: int) -> None:
    print(f"\n{model}, batch {batch}, full window: CPU seconds over an SGD step, medians of {rounds} rounds")
    print(f"{'case':<24}{'SGD s':>8}{'whole step':>12}{'own time':>10}")
    for case in [None, *cases]:
        base, other = Trainer(model, None, batch), Trainer(model, case, batch)
        other.fill()
        samples = []
        for index in range(rounds + 1):
            (sgd, _), (whole, inside) = base.step(), other.step()
            if index:
                samples.append((sgd, whole / sgd, 1 + inside / sgd))
        sgd_s, ratio, own = (statistics.median(column) for column in zip(*samples, strict=True))
        print(f"{case or 'sgd':<24}{sgd_s:>8.3f}{ratio:>12.3f}{own:>10.3f}", flush=True)


def state_formula(method: Windowed, case: str) -> int:
    """Returns the bytes that the documented formulas say."""
    sizes = [tuple(parameter.shape) for parameter in method.parameters]
    d, m = sum(parameter.numel() for parameter in method.parameters), method.capacity
    gram = 8 * m * m
    if case.startswith("sparse"):
        density = 0.1 if "10%" in case else 0.01
        per_entry = 4 if "4 B" in case else 8
        full, rest = divmod(d, 32_768)
        kept = full * _ceil(32_768 * density) + (_ceil(rest * density) if rest else 0)
        return per_entry * m * kept + 4 * d + gram
    if case.startswith("low"):
        rank = 4 if "rank 4" in case else 1
        return 4 * m * sum(_factor_numbers(size, rank) for size in sizes) + 4 * d + gram
    return 4 * m * d + gram


def _ceil(value: float) -> int:
    return max(1, -int(-(value - 1e-9) // 1))


def _factor_numbers(size: tuple[int, ...], rank: int) -> int:
    n1 = size[0] if size else 1
    n2 = 1
    for length in size[1:]:
        n2 *= length
    return rank * (n1 + n2) if rank * (n1 + n2) < n1 * n2 else n1 * n2 + 1


def print_state(model: str, cases: list[str]) -> None:
    print(f"\n{model}: bytes of state")
    print(f"{'case':<24}{'held':>16}{'formula':>16}{'over weights':>14}")
    for case in cases:
        built = models.build_model(model, 10, 3, 32)
        method = CASES[case](built)
        for parameter in built.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.step()
        held = sum(kind.size_bytes for kind in method.diagnostics().memory)
        weights = 4 * sum(parameter.numel() for parameter in built.parameters())
        expected = state_formula(method, case)
        print(f"{case:<24}{held:>16,}{expected:>16,}{held / weights:>14.1f}", flush=True)


def best_s(run: Callable[[], Any], repeats: int) -> float:
    """Returns the shortest wall time of some calls: the one that was disturbed least."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def print_kernels(model: str, cases: list[str], repeats: int) -> None:
    print(f"\n{model}: passes over a full window; GB/s of the bytes that must move")
    print(f"{'case':<24}{'MB':>9}{'G x':>9}{'G^T c':>9}{'copy':>9}{'ms':>8}{'ms':>8}")
    for case in cases:
        trainer = Trainer(model, case, 1)
        trainer.fill()
        assert trainer.method is not None
        history, m = trainer.method.history, trainer.method.capacity
        size = sum(parameter.numel() for parameter in trainer.method.parameters)
        vector, coefficients = torch.randn(size), torch.randn(m, dtype=torch.float64)
        moved = history.memory_bytes() + 4 * size
        source = torch.empty(moved // 8)
        target = torch.empty_like(source)
        products = best_s(lambda: history.products(vector, m), repeats)  # noqa: B023
        combine = best_s(lambda: history.combine(coefficients), repeats)  # noqa: B023
        copy = best_s(lambda: target.copy_(source), repeats)  # noqa: B023
        speeds = "".join(f"{moved / seconds / 1e9:>9.1f}" for seconds in (products, combine, copy))
        print(f"{case:<24}{moved / 1e6:>9.1f}{speeds}{1e3 * products:>8.2f}{1e3 * combine:>8.2f}", flush=True)


def updated_factor(factor: Tensor, vector: Tensor, sign: float) -> Tensor:
    """Returns the Cholesky factor of ``L L^T + sign v v^T``, column by column (Golub & Van Loan, 6.5.4)."""
    lower, v = factor.clone(), vector.clone()
    for k in range(len(v)):
        diagonal = lower[k, k]
        r = (diagonal.square() + sign * v[k].square()).sqrt()
        c, s = r / diagonal, v[k] / diagonal
        lower[k, k] = r
        if k + 1 < len(v):
            lower[k + 1 :, k] = (lower[k + 1 :, k] + sign * s * v[k + 1 :]) / c
            v[k + 1 :] = c * v[k + 1 :] - s * lower[k + 1 :, k]
    return lower


def kept_s(m: int, steps: int) -> tuple[float, float]:
    """Returns the mean seconds of a solve by the kept factor, and of one from scratch, in a full ring."""
    ring, rows = Ring(m, torch.device("cpu")), torch.randn(m, 2 * m, dtype=torch.float64)
    for _ in range(m):
        slot = ring.advance()
        ring.set_row(rows[: ring.count] @ rows[slot])
    factor = RingFactor(ring)
    times, anew = [], []
    for _ in range(steps):
        slot = ring.advance()
        rows[slot].normal_()
        ring.set_row(rows @ rows[slot])
        begin = time.perf_counter()
        factor.solve(1.0, ring.unit())
        times.append(time.perf_counter() - begin)
        anew.append(best_s(lambda: solve_shifted(ring.gram, 1.0, ring.unit()), 1))
    return statistics.mean(times), statistics.mean(anew)


def print_factor() -> None:
    print("\nsolve after one row of the Gram matrix changed, ms in the mean; factor updated column by column")
    print(f"{'m':>6}{'from scratch':>14}{'kept in blocks':>16}{'updated':>10}")
    for m in (32, 128, 512, 1024):
        kept, anew = kept_s(m, 2 * BLOCK)
        factor = torch.linalg.cholesky(torch.eye(m, dtype=torch.float64) * m)
        change = torch.randn(m, dtype=torch.float64) / m
        both = best_s(lambda: updated_factor(updated_factor(factor, change, 1), change, -1), 1)  # noqa: B023
        print(f"{m:>6}{1e3 * anew:>14.2f}{1e3 * kept:>16.2f}{1e3 * both:>10.2f}", flush=True)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=MODELS, default="resnet32")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="batch 16, 2 rounds, small windows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Phases are timed by the wall; here other work shares the machine.
    stopwatch._now = time.process_time  # noqa: SLF001
    cases = [case for case in options.cases if not (options.quick and "1024" in case)]
    rounds = 2 if options.quick else options.rounds
    if "time" in options.parts:
        print_times(options.model, cases, rounds, 16 if options.quick else 128)
    if "state" in options.parts:
        print_state(options.model, cases)
    if "kernels" in options.parts:
        print_kernels(options.model, cases, rounds)
    if "factor" in options.parts:
        print_factor()


if __name__ == "__main__":
    main()
