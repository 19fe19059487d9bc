"""What K-FAC costs over SGD: CPU time of each kind of step, memory, and bytes against their formula.

Run: ``python -m benchmarks.kfac [--quick] [--models resnet32 resnet50] [--cases eigen] [--parts time]``.

Time. Every case trains its own copy of the model beside a plain SGD copy, in one process, step by step in
turn. K-FAC's step is plain, or updates the factors, or factors and inverses. Each is the CPU time of all
threads inside K-FAC's own phases, its hooks included, over that of the SGD step beside it, plus 1: no
difference of two large numbers. Medians over the rounds. The amortised ratio at (factor_every,
inverse_every) = (f, i) follows from the three. ``whole`` is the measured ratio of a whole step that updates
everything, hooks' dispatch and disturbed caches included; SGD against itself shows its noise.

Stagger. The mean and the worst of the ten steps of a period of 10 with staggering, each the lower of two
periods, over an SGD step.

Memory. Peak resident memory of a process of its own for each case, less that of plain SGD; beside it the
bytes that K-FAC reports to hold between steps, over the bytes of the weights, on 1, 2 and 4 ranks.

Bytes. Handed to collectives by each of 1, 2 and 4 ranks, the most and what the formula says
(`hpcsngd.optim.kaisa`).
"""

from __future__ import annotations

import os

# libgomp's threads otherwise spin while they wait, which counts as CPU time; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import multiprocessing
import re
import statistics
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.hylo import SHAPES, Shape
from hpcsngd import dist
from hpcsngd.optim import KFAC, stopwatch
from hpcsngd.optim.kaisa import Grid
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
RANKS = (1, 2, 4)
PERIODS = ((1, 1), (1, 10), (10, 10), (10, 100), (100, 100))
PARTS = ("time", "stagger", "memory", "bytes")


class Trainer:
    """A model in training on one fixed batch of noise, with K-FAC or without.

    Without other periods the steps are in turn: everything, plain, factors, plain.
    """

    def __init__(self, shape: Shape, options: dict[str, Any] | None, batch: int) -> None:
        torch.manual_seed(0)
        self.model = shape.build()
        self.x = torch.randn(batch, 3, shape.pixels, shape.pixels)
        self.target = torch.randint(0, 10, (batch,))
        common: dict[str, Any] = {"factor_every": 2, "inverse_every": 4, "rescale": "norm", "profile": True}
        self.kfac = None if options is None else KFAC(self.model, **(common | options))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> tuple[float, dict[str, float]]:
        """Trains one step; returns the CPU seconds of it and of each of K-FAC's phases in it."""
        begin, phases = time.process_time(), {}
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.target).backward()  # type: ignore[no-untyped-call]
        if self.kfac is not None:
            self.kfac.step()
            phases = {phase.phase: phase.seconds for phase in self.kfac.diagnostics().phases}
        self.optimizer.step()
        return time.process_time() - begin, phases


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


def measure_times(shape: Shape, options: dict[str, Any] | None, rounds: int, batch: int) -> Times:
    """Returns the times of a case; of SGD against itself without ``options``."""
    base, case = Trainer(shape, None, batch), Trainer(shape, options, batch)
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


def measure_stagger(shape: Shape, options: dict[str, Any], batch: int) -> tuple[float, float]:
    """Returns the mean and the worst step of a staggered period of 10 over an SGD step."""
    period = 10
    periods = {"factor_every": period, "inverse_every": period, "stagger": True}
    base, case = Trainer(shape, None, batch), Trainer(shape, options | periods, batch)
    base.step()
    case.step()
    steps = [(base.step()[0], sum(case.step()[1].values())) for _ in range(2 * period)]
    sgd = statistics.median(seconds for seconds, _ in steps)
    ratios = [1 + min(steps[slot][1], steps[slot + period][1]) / sgd for slot in range(period)]
    return statistics.mean(ratios), max(ratios)


def peak_rss_mb(model: str, case: str, batch: int) -> float:
    """Returns the peak memory of four training steps in a fresh process, in MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (model, case, batch))


def _peak_here(model: str, case: str, batch: int) -> float:
    trainer = Trainer(SHAPES[model], CASES.get(case), batch)
    for _ in range(4):
        trainer.step()
    # Not getrusage: its peak begins with that of the process that started this one.
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak_kib) * 1024 / 1e6


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
    trainer = Trainer(SHAPES[model], options, batch)
    assert trainer.kfac is not None
    trainer.x += dist.rank()  # not the same samples on every rank
    sent = []
    for _ in range(2):
        trainer.step()
        record = trainer.kfac.diagnostics()
        sent.append(sum(item.size_bytes for item in record.communication))
    layers = trainer.kfac._layers  # noqa: SLF001 - nobody else needs to know the placement
    everything, plain = sent
    return Seen(
        everything=everything,
        plain=plain,
        held=sum(item.size_bytes for item in record.memory),
        weights=sum(parameter.nbytes for parameter in trainer.model.parameters()),
        shapes={layer.name: layer.factor_shapes() for layer in layers},
        entries={layer.name: sum(p.numel() for p in layer.parameters) for layer in layers},
        roles={name: (role.column, role.holders) for name, role in trainer.kfac._roles.items()},  # noqa: SLF001
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
        is_eigen, panels = options["inverse"] == "eigen", range(0, shape[-1], 64)
        if len(shape) == 3 and shape[-1] >= 384:
            matrix = shape[0] * sum(min(64, shape[-1] - j) * (shape[-1] - j) for j in panels)
            matrix += is_eigen * shape[0] * sum(min(64, shape[-1] - j) ** 2 for j in panels)
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
    for case in ["sgd", *cases]:
        times = measure_times(SHAPES[model], CASES.get(case), rounds, batch)
        steps = "".join(
            f"{1 + t:>{w}.3f}" for t, w in ((times.plain, 7), (times.factors, 9), (times.everything, 11))
        )
        amortised = "".join(f"{times.amortised(*periods):>11.3f}" for periods in PERIODS)
        print(f"{case:<9}{times.sgd_s:>7.3f}{times.whole:>7.3f}{steps}{amortised}")
        if times.phases:
            print(f"{'':<9}{', '.join(f'{name} {ratio:.3f}' for name, ratio in times.phases.items())}")


def print_stagger(model: str, cases: list[str], batch: int) -> None:
    print(f"\n{model}, batch {batch}, staggered over 10 steps: over an SGD step")
    print(f"{'case':<9}{'mean step':>11}{'worst step':>12}")
    for case in cases:
        mean, worst = measure_stagger(SHAPES[model], CASES[case], batch)
        print(f"{case:<9}{mean:>11.3f}{worst:>12.3f}")


def print_memory(model: str, cases: list[str], batch: int) -> None:
    print(f"\n{model}, batch {batch}: peak MB of one rank")
    base = peak_rss_mb(model, "sgd", batch)
    print(f"{'sgd':<9}{base:>8.0f}")
    for case in cases:
        peak = peak_rss_mb(model, case, batch)
        print(f"{case:<9}{peak:>8.0f}{peak - base:>+8.0f}")


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
                print(f"{case:<9}{placement:<12}{ranks:>6}{line}")


def measure_placement(model: str, options: dict[str, Any], ranks: int, batch: int) -> str:
    """Returns a line of the table of bytes."""
    seen = run_on_ranks(look, ranks, model, options, batch)
    rank = max(range(ranks), key=lambda r: seen[r].everything)
    everything, plain = formula(options, ranks, rank, seen[rank])
    sent = f"{seen[rank].everything:>13,}{everything:>13,}{seen[rank].plain:>11,}{plain:>11,}"
    held = max(of_rank.held for of_rank in seen)
    return f"{sent}{held / 1e6:>9.1f}{held / seen[0].weights:>11.1f}"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="batch 16, 2 rounds: does it run at all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # K-FAC times its phases by the wall; here other work shares the machine.
    stopwatch._now = time.process_time  # noqa: SLF001
    for model in options.models:
        batch = 16 if options.quick else SHAPES[model].batch
        if "time" in options.parts:
            print_times(model, options.cases, 2 if options.quick else options.rounds, batch)
        if "stagger" in options.parts:
            print_stagger(model, options.cases, batch)
        if "memory" in options.parts:
            print_memory(model, options.cases, batch)
        if "bytes" in options.parts:
            # Formulas hold for any batch; four copies of a full one would not fit small machines.
            # Bytes do not depend on the batch.
            print_bytes(model, options.cases, min(batch, 4))


if __name__ == "__main__":
    main()
