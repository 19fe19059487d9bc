"""What HyLo costs over SGD: CPU time of each kind of step, memory, and bytes against their formula.

Run: ``python -m benchmarks.hylo [--quick] [--models resnet32 resnet50] [--cases sngd kid] [--parts time]``.

Time. Every case trains its own copy of the model beside a plain SGD copy, in one process, step by step in
turn: SGD, refresh, SGD, plain. Ratios are CPU seconds of all threads over those of the SGD steps next to it,
medians over the rounds; the amortised ratio at period f is ``(refresh + (f - 1) plain) / f``. Two SGD copies
against each other show the noise. ``HyLo alone`` is the CPU time inside HyLo's own phases, capture included,
over that of an SGD step: no difference of two large numbers, so the figure to trust.

Stagger. ``HyLo alone`` at refresh_every 10 with staggering: the mean and the worst of the ten steps of a
period, each the lower of two periods, plus 1 for the SGD step.

Memory. Peak resident memory of a process of its own for each case, less that of plain SGD; beside it the
bytes that HyLo reports to hold between steps.

Bytes. Handed to collectives per refresh by rank 0 of 1, 2 and 4 ranks, and what the formula says.
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
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcsngd import dist
from hpcsngd.optim import HyLo, stopwatch
from hpcsngd.train import models
from tests.ranks import run_on_ranks

CASES: dict[str, dict[str, Any]] = {
    "sngd": {"method": "sngd"},
    "kis": {"method": "kis", "ratio": 0.1},
    "kid": {"method": "kid", "ratio": 0.1},
    "sngd exact": {"method": "sngd", "conv_mode": "exact"},
}
RANKS = (1, 2, 4)
PERIODS = (1, 10, 100)
PARTS = ("time", "stagger", "memory", "bytes")


@dataclass(frozen=True)
class Shape:
    """A model of 10 classes, by its name in experiments, and the images it sees here."""

    model: str
    batch: int
    pixels: int

    def build(self) -> nn.Module:
        """Returns the model with fresh weights."""
        return models.build_model(self.model, 10, 3, self.pixels)


SHAPES = {"resnet32": Shape("resnet32", 128, 32), "resnet50": Shape("torchvision/resnet50", 32, 64)}


class Trainer:
    """A model in training on one fixed batch of noise, with HyLo or without; every second step refreshes."""

    def __init__(
        self, shape: Shape, options: dict[str, Any] | None, batch: int, refresh_every: int = 2
    ) -> None:
        torch.manual_seed(0)
        self.model = shape.build()
        self.x = torch.randn(batch, 3, shape.pixels, shape.pixels)
        self.target = torch.randint(0, 10, (batch,))
        common: dict[str, Any] = {"refresh_every": refresh_every, "rescale": "norm", "profile": True}
        self.hylo = None if options is None else HyLo(self.model, **common, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> tuple[float, float]:
        """Trains one step; returns the CPU seconds of it and of HyLo's phases in it."""
        begin, inside = time.process_time(), 0.0
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.target).backward()  # type: ignore[no-untyped-call]
        if self.hylo is not None:
            self.hylo.step()
            inside = sum(phase.seconds for phase in self.hylo.diagnostics().phases)
        self.optimizer.step()
        return time.process_time() - begin, inside


@dataclass(frozen=True)
class Times:
    """CPU seconds over those of an SGD step: medians of all rounds."""

    sgd_s: float
    refresh: float
    plain: float
    refresh_inside: float
    plain_inside: float

    def amortised(self, period: int) -> float:
        """Returns the ratio of an average step at ``refresh_every=period``."""
        return (self.refresh + (period - 1) * self.plain) / period


def measure_times(shape: Shape, options: dict[str, Any] | None, rounds: int, batch: int) -> Times:
    """Returns the times of a case; of SGD against itself without ``options``."""
    base, case = Trainer(shape, None, batch), Trainer(shape, options, batch)
    samples = []
    for index in range(rounds + 1):
        first, refresh, second, plain = base.step(), case.step(), base.step(), case.step()
        sgd = (first[0] + second[0]) / 2
        if index:  # the first round warms up
            ratios = (seconds / sgd for seconds in (refresh[0], plain[0], refresh[1], plain[1]))
            samples.append((sgd, *ratios))
    return Times(*(statistics.median(column) for column in zip(*samples, strict=True)))


def measure_stagger(shape: Shape, options: dict[str, Any], batch: int) -> tuple[float, float]:
    """Returns the mean and the worst step of a staggered period of 10 over an SGD step."""
    period = 10
    base, case = Trainer(shape, None, batch), Trainer(shape, {**options, "stagger": True}, batch, period)
    base.step()
    case.step()
    steps = [(base.step()[0], case.step()[1]) for _ in range(2 * period)]
    sgd = statistics.median(seconds for seconds, _ in steps)
    ratios = [1 + min(steps[slot][1], steps[slot + period][1]) / sgd for slot in range(period)]
    return statistics.mean(ratios), max(ratios)


def peak_rss_mb(model: str, case: str, batch: int) -> tuple[float, float]:
    """Returns the peak memory of four training steps in a fresh process, and what HyLo holds, in MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_here, (model, case, batch))


def _peak_here(model: str, case: str, batch: int) -> tuple[float, float]:
    trainer = Trainer(SHAPES[model], CASES.get(case), batch)
    for _ in range(4):
        trainer.step()
    held = 0 if trainer.hylo is None else sum(kind.size_bytes for kind in trainer.hylo.diagnostics().memory)
    # Not getrusage: its peak begins with that of the process that started this one.
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak_kib) * 1024 / 1e6, held / 1e6


@dataclass(frozen=True)
class Traffic:
    """What one rank handed to collectives, and what the formula needs to know; numbers by layer."""

    refresh: int
    plain: int
    rows: dict[str, int]
    entries: dict[str, int]
    owners: dict[str, int]


def traffic(model: str, case: str, batch: int) -> Traffic:
    """Returns what this rank sent in the first refresh and in the plain step after it."""
    trainer = Trainer(SHAPES[model], CASES[case], batch)
    assert trainer.hylo is not None
    trainer.x += dist.rank()  # not the same samples on every rank
    sent = []
    for _ in range(2):
        trainer.step()
        sent.append(sum(item.size_bytes for item in trainer.hylo.diagnostics().communication))
    state = trainer.hylo.state_dict()
    rows = {
        name: sum(tensor[0].numel() for tensor in layer["rows"]) for name, layer in state["layers"].items()
    }
    modules = dict(trainer.model.named_modules())
    entries = {name: sum(p.numel() for p in modules[name].parameters()) for name in rows}
    return Traffic(sent[0], sent[1], rows, entries, state["owners"])


def formula(case: str, ranks: int, batch: int, seen: Traffic) -> tuple[int, int, int]:
    """Returns the bytes of a refresh on rank 0, least and most, and of a plain step.

    See `hpcsngd.optim.placement` and `sketches`. KIS may draw all its samples from one rank, or none.
    """
    if ranks == 1:
        return 0, 0, 0
    owned = [sum(seen.entries[n] for n, owner in seen.owners.items() if owner == r) for r in range(ranks)]
    plain = 4 * max(owned)
    # Samples and terms of every layer; failures of every layer; kept samples of those with an owner.
    fixed = plain + (16 + 8) * len(seen.rows) + 8 * len(seen.owners)
    shared = sum(numbers for name, numbers in seen.rows.items() if name not in seen.owners)
    elsewhere = sum(seen.rows[name] for name, owner in seen.owners.items() if owner != 0)
    if CASES[case]["method"] != "kis":
        return (fixed + 4 * batch * (shared + elsewhere),) * 2 + (plain,)
    fixed += 8 * batch * len(seen.rows)
    kept = round(CASES[case]["ratio"] * batch * ranks)
    most = fixed + 4 * min(kept, batch) * (shared + elsewhere)
    return fixed + 4 * shared * kept // ranks, most, plain


def print_times(model: str, cases: list[str], rounds: int, batch: int) -> None:
    header = "".join(f"{f'every {period}':>11}" for period in PERIODS)
    print(f"\n{model}, batch {batch}: CPU seconds over an SGD step, medians of {rounds} rounds")
    print(
        f"{'case':<12}{'SGD s':>8}{'refresh':>9}{'plain':>8}{header}{'HyLo alone: refresh':>21}{'plain':>8}"
    )
    for case in ["sgd", *cases]:
        times = measure_times(SHAPES[model], CASES.get(case), rounds, batch)
        amortised = "".join(f"{times.amortised(period):>11.3f}" for period in PERIODS)
        inside = f"{times.refresh_inside:>21.3f}{times.plain_inside:>8.3f}"
        print(f"{case:<12}{times.sgd_s:>8.3f}{times.refresh:>9.3f}{times.plain:>8.3f}{amortised}{inside}")


def print_stagger(model: str, cases: list[str], batch: int) -> None:
    print(f"\n{model}, batch {batch}, staggered over 10 steps: over an SGD step")
    print(f"{'case':<12}{'mean step':>11}{'worst step':>12}")
    for case in cases:
        mean, worst = measure_stagger(SHAPES[model], CASES[case], batch)
        print(f"{case:<12}{mean:>11.3f}{worst:>12.3f}")


def print_memory(model: str, cases: list[str], batch: int) -> None:
    print(f"\n{model}, batch {batch}: MB")
    print(f"{'case':<12}{'peak':>8}{'above SGD':>11}{'held':>8}")
    base, _ = peak_rss_mb(model, "sgd", batch)
    print(f"{'sgd':<12}{base:>8.0f}{0:>11.0f}{0:>8.1f}")
    for case in cases:
        peak, held = peak_rss_mb(model, case, batch)
        print(f"{case:<12}{peak:>8.0f}{peak - base:>11.0f}{held:>8.1f}")


def print_bytes(model: str, cases: list[str], batch: int) -> None:
    print(f"\n{model}, batch {batch} per rank, refresh every 2 steps: bytes that rank 0 hands to collectives")
    print(f"{'case':<12}{'ranks':>6}{'owned':>7}{'refresh':>14}{'formula':>28}{'plain':>12}{'formula':>12}")
    for case in cases:
        for ranks in RANKS:
            seen = run_on_ranks(traffic, ranks, model, case, batch)[0]
            least, most, plain = formula(case, ranks, batch, seen)
            text = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            counts = f"{ranks:>6}{len(seen.owners):>4}/{len(seen.rows)}{seen.refresh:>14,}"
            print(f"{case:<12}{counts}{text:>28}{seen.plain:>12,}{plain:>12,}")


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
    # HyLo times its phases by the wall; here other work shares the machine.
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
            print_bytes(model, options.cases, min(batch, 16))


if __name__ == "__main__":
    main()
