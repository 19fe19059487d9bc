"""What K-FAC costs over SGD: CPU time of each kind of step, memory, and bytes against their formula.

Run: ``python -m benchmarks.kfac [--quick] [--models resnet32 resnet50] [--cases eigen] [--parts time]``.

Time. Every case trains its own copy of the model beside a plain SGD copy, in one process, step by step in
turn. K-FAC's step is plain, or updates the factors, or factors and inverses. Each is the CPU time of all
threads inside K-FAC's own phases, its hooks included, over that of the SGD step beside it, plus 1: no
difference of two large numbers. Medians over the rounds. The amortised ratio at (factor_every,
inverse_every) = (f, i) follows from the three. ``whole`` is the measured ratio of a whole step that updates
everything, hooks' dispatch and disturbed caches included; SGD against itself shows its noise.

Stagger. The mean and the worst of the ten steps of a period of 10 with staggering, over an SGD step.
ResNet-32: each step the lower of two periods.

Memory. Peak resident memory of a process of its own for each case, less that of plain SGD; beside it the
bytes that K-FAC reports to hold between steps, over the bytes of the weights, on 1, 2 and 4 ranks.

Newton. The inverses of one refresh by Cholesky, as K-FAC computes them, and by Newton and Schulz's iteration,
which is nothing but products, to a residual that is coarse for the purpose.

Bytes. Handed to collectives by each of 1, 2 and 4 ranks, the most and what the formula says
(`hpcsngd.optim.kaisa`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.common import (
    PERIOD,
    RANKS,
    SHAPES,
    Shape,
    Trainer,
    arguments,
    print_memory,
    print_stagger,
    size_of_run,
)
from hpcsngd.optim import KFAC, kfac_inverter
from hpcsngd.optim.kaisa import Grid
from hpcsngd.optim.kfac_decompose import inverse_each
from hpcsngd.optim.packing import packed_numbers
from tests.ranks import run_on_ranks

CASES: dict[str, dict[str, Any]] = {
    "eigen": {"inverse": "eigen"},
    "inverse": {"inverse": "cholesky"},
}
LOCAL = {"factors": "local", "grad_worker_fraction": 0.0}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "comm-opt": {},
    "hybrid": {"grad_worker_fraction": 0.5},
    "mem-opt": {"grad_worker_fraction": 0.0},
    "local (dp)": LOCAL,
}
PERIODS = ((1, 1), (1, 10), (10, 10), (10, 100), (100, 100))
PARTS = ("time", "stagger", "memory", "newton", "bytes")
#: Plain SGD beside SGD: what differences mean nothing.
BASE = "sgd"


def build(options: dict[str, Any], model: nn.Module) -> KFAC:
    """Returns K-FAC for a model; without other periods: everything, plain, factors, plain."""
    common: dict[str, Any] = {"factor_every": 2, "inverse_every": 4, "rescale": "norm", "profile": True}
    return KFAC(model, **common | options)


@dataclass(frozen=True)
class Times:
    """CPU seconds over those of an SGD step, medians of all rounds: K-FAC's own, by kind of step.

    Attributes:
        sgd_s: of an SGD step, not divided.
        whole: of a whole step that updates everything.
        plain: inside K-FAC in a plain step.
        factors: the same in one that updates factors.
        everything: the same in one that updates factors and inverses.
        phases: the same by phase in one that updates everything.
    """

    sgd_s: float
    whole: float
    plain: float
    factors: float
    everything: float
    phases: dict[str, float]

    def amortised(self, factor_every: int, inverse_every: int) -> float:
        """Returns the ratio of an average step."""
        factors, inverses = self.factors - self.plain, self.everything - self.factors
        return 1 + self.plain + factors / factor_every + inverses / inverse_every


def measure_times(shape: Shape, name: str, rounds: int, batch: int) -> Times:
    """Returns the times of a case."""
    builder = None if name == BASE else partial(build, CASES[name])
    base: Trainer[KFAC] = Trainer(shape, None, batch)
    case = Trainer(shape, builder, batch)
    samples: list[dict[str, float]] = []
    for index in range(rounds + 1):
        steps = [(base.step()[0], *case.step()) for _ in range(4)]
        sgd = statistics.median(seconds for seconds, _, _ in steps)
        if index:  # the first round warms up
            inside = [sum(phases.values()) / sgd for _, _, phases in steps]
            numbers = {"sgd_s": sgd, "whole": steps[0][1] / sgd, "everything": inside[0]}
            numbers |= {"plain": (inside[1] + inside[3]) / 2, "factors": inside[2]}
            samples.append(numbers | {f"phase {name}": s / sgd for name, s in steps[0][2].items()})
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    phases = {name[6:]: medians.pop(name) for name in list(medians) if name.startswith("phase ")}
    return Times(**medians, phases=phases)


@dataclass(frozen=True)
class Seen:
    """What one rank sent and holds, and what the formula needs to know."""

    everything: int
    plain: int
    held: int
    weights: int
    shapes: dict[str, list[tuple[int, ...]]]
    entries: dict[str, int]
    roles: dict[str, tuple[int, tuple[int, ...]]]


def look(model: str, options: dict[str, Any], batch: int) -> Seen:
    """Returns what this rank sent in a step that updates everything and in the plain step after it."""
    trainer = Trainer(SHAPES[model], partial(build, options), batch)
    sent = []
    for _ in range(2):
        trainer.step()
        sent.append(trainer.sent())
    layers = trainer.method._layers  # noqa: SLF001 - nobody else needs to know the placement
    everything, plain = sent
    return Seen(
        everything=everything,
        plain=plain,
        held=trainer.held(),
        weights=sum(parameter.nbytes for parameter in trainer.model.parameters()),
        shapes={layer.name: layer.factor_shapes() for layer in layers},
        entries={layer.name: sum(p.numel() for p in layer.parameters) for layer in layers},
        roles={name: (role.column, role.holders) for name, role in trainer.method._roles.items()},  # noqa: SLF001
    )


def formula(options: dict[str, Any], ranks: int, rank: int, seen: Seen) -> tuple[int, int]:
    """Returns the bytes of a step that updates everything, and of a plain one; see `hpcsngd.optim.kaisa`."""
    if ranks == 1:
        return 0, 0
    grid = Grid.of_fraction(ranks, options.get("grad_worker_fraction", 1.0))
    items = [
        (shape, at)
        for n, shapes in seen.shapes.items()
        for shape, at in zip(shapes, seen.roles[n][1], strict=True)
    ]
    elsewhere = 4 * sum(packed_numbers(shape) for shape, at in items if at != rank)
    agree = 24 * len(seen.shapes) + 24 * len(items) + 8 * sum(shape[0] for shape, _ in items)

    def sent(shape: tuple[int, ...]) -> int:
        is_eigen, side = options["inverse"] == "eigen", shape[-1]
        if len(shape) == 3 and side >= 384 and is_eigen:
            cleared = 64 * round(side / 3 / 64)
            panels = sum(64 * (side - j + 64) for j in range(0, cleared, 64))
            matrix = shape[0] * (panels + (side - cleared) ** 2)
        elif len(shape) == 3 and side >= 384:
            matrix = shape[0] * sum(min(64, side - j) * (side - j) for j in range(0, side, 64))
        else:
            matrix = prod(shape) if is_eigen and len(shape) == 3 else packed_numbers(shape)
        return matrix + (prod(shape[:2]) if is_eigen and len(shape) == 3 else 0)

    column = grid.columns[grid.column_of(rank)]
    inverses = [sum(sent(shape) for shape, at in items if at == member) for member in column]
    entries = [
        sum(n for name, n in seen.entries.items() if seen.roles[name][0] == c)
        for c in range(len(grid.columns))
    ]
    plain = 4 * max(entries) if len(grid.columns) > 1 else 0
    everything = agree + plain + (4 * max(inverses) if len(column) > 1 else 0)
    return everything + (0 if options.get("factors") == "local" else elsewhere), plain


def print_times(model: str, cases: list[str], rounds: int, batch: int) -> None:
    print(f"\n{model}, batch {batch}: CPU seconds over an SGD step, medians of {rounds} rounds")
    header = "".join(f"{f'({f},{i})':>11}" for f, i in PERIODS)
    print(f"{'case':<9}{'SGD s':>7}{'whole':>7}{'plain':>7}{'factors':>9}{'everything':>11}{header}")
    for case in [BASE, *cases]:
        times = measure_times(SHAPES[model], case, rounds, batch)
        steps = "".join(
            f"{1 + t:>{w}.3f}" for t, w in ((times.plain, 7), (times.factors, 9), (times.everything, 11))
        )
        amortised = "".join(f"{times.amortised(*periods):>11.3f}" for periods in PERIODS)
        print(f"{case:<9}{times.sgd_s:>7.3f}{times.whole:>7.3f}{steps}{amortised}", flush=True)
        if times.phases:
            print(f"{'':<9}{', '.join(f'{name} {ratio:.3f}' for name, ratio in times.phases.items())}")


def print_bytes(model: str, cases: list[str], batch: int) -> None:
    print(
        f"\n{model}, batch {batch} per rank: bytes that the busiest rank sends, and the most that one holds"
    )
    titles = f"{'everything':>13}{'formula':>13}{'plain':>11}{'formula':>11}{'held MB':>9}{'x weights':>11}"
    print(f"{'case':<9}{'placement':<12}{'ranks':>6}{titles}")
    for case in cases:
        for placement, options in PLACEMENTS.items():
            for ranks in RANKS:
                if (ranks == 1 and placement != "comm-opt") or (ranks == 2 and placement == "hybrid"):
                    continue
                line = measure_placement(model, CASES[case] | options, ranks, batch)
                print(f"{case:<9}{placement:<12}{ranks:>6}{line}", flush=True)


def measure_placement(model: str, options: dict[str, Any], ranks: int, batch: int) -> str:
    """Returns a line of the table of bytes."""
    seen = run_on_ranks(look, ranks, model, options, batch)
    rank = max(range(ranks), key=lambda r: seen[r].everything)
    everything, plain = formula(options, ranks, rank, seen[rank])
    sent = f"{seen[rank].everything:>13,}{everything:>13,}{seen[rank].plain:>11,}{plain:>11,}"
    held = max(of_rank.held for of_rank in seen)
    return f"{sent}{held / 1e6:>9.1f}{held / seen[0].weights:>11.1f}"


def damped_factors(model: str, batch: int) -> list[Tensor]:
    """Returns the matrices that ``inverse`` inverts after a step of a model, damped as it damps them."""
    found: list[Tensor] = []

    def noted(factors: Sequence[Tensor]) -> Any:
        found.extend(factor for factor in factors if factor.dim() == 3)
        return inverse_each(factors)

    with patch.object(kfac_inverter, "inverse_each", noted):
        Trainer(SHAPES[model], partial(build, CASES["inverse"]), batch).step()
    return found


def newton_schulz(matrices: Tensor, residual: float, most: int = 60) -> tuple[Tensor, int]:
    """Returns inverses by ``X <- X (2 I - A X)`` from ``X = A / (|A|_1 |A|_inf)``, and how many iterations.

    Args:
        matrices: symmetric, ``(blocks, d, d)``.
        residual: of ``|I - A X|_F / sqrt(d)`` in every block.
        most: iterations.
    """
    scale = matrices.abs().sum(2).amax(1).square()[:, None, None]
    found, twice = matrices / scale, 2 * torch.eye(matrices.shape[2])
    for iteration in range(1, most + 1):
        product = matrices @ found
        lacking = (product - twice / 2).square().sum((1, 2)).sqrt() / matrices.shape[2] ** 0.5
        if float(lacking.max()) <= residual:
            return found, iteration
        found = found @ (twice - product)
    return found, most


def print_newton(model: str, batch: int) -> None:
    """Prints what inverting a model's factors costs by Cholesky and by Newton and Schulz's iteration."""
    sizes: dict[int, list[Tensor]] = {}
    for factor in damped_factors(model, batch):
        sizes.setdefault(factor.shape[2], []).append(factor)
    print(f"\n{model}: inverses of all damped factors, CPU ms; Newton-Schulz to a residual of 1e-3")
    print(f"{'rows':>6}{'blocks':>8}{'cholesky':>10}{'newton':>9}{'iterations':>12}")
    totals = [0.0, 0.0]
    for side, factors in sorted(sizes.items()):
        matrices = torch.cat(factors)
        iterations = newton_schulz(matrices, 1e-3)[1]
        times = [
            1000 * _cpu_s(run)
            for run in (lambda: inverse_each([matrices]), lambda: newton_schulz(matrices, 1e-3))  # noqa: B023
        ]
        totals = [total + own for total, own in zip(totals, times, strict=True)]
        print(f"{side:>6}{len(matrices):>8}{times[0]:>10.2f}{times[1]:>9.2f}{iterations:>12}", flush=True)
    print(f"{'sum':>14}{totals[0]:>10.2f}{totals[1]:>9.2f}", flush=True)


def _cpu_s(run: Callable[[], Any], repeats: int = 5) -> float:
    """Returns the median CPU time of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def main() -> None:
    options = arguments(__doc__, CASES, ["resnet32", "resnet50"], PARTS)
    spread = {"factor_every": PERIOD, "inverse_every": PERIOD, "stagger": True}
    for model in options.models:
        rounds, batch = size_of_run(options, model)
        cases: dict[str, dict[str, Any]] = {case: CASES[case] for case in options.cases}
        if "time" in options.parts:
            print_times(model, options.cases, rounds, batch)
        if "stagger" in options.parts:
            staggered = {case: partial(build, own | spread) for case, own in cases.items()}
            print_stagger(model, staggered, batch)
        if "memory" in options.parts:
            print_memory(model, {case: partial(build, own) for case, own in cases.items()}, batch)
        if "newton" in options.parts:
            print_newton(model, min(batch, 16))
        if "bytes" in options.parts:
            # Bytes do not depend on the batch; four copies of a full one would not fit small machines.
            print_bytes(model, options.cases, min(batch, 4))


if __name__ == "__main__":
    main()
