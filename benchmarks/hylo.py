"""What HyLo costs over SGD: CPU time of each kind of step, memory, and bytes against their formula.

Run: ``python -m benchmarks.hylo [--quick] [--models resnet32 resnet50] [--cases sngd kid] [--parts time]``.

Time. Every case trains its own copy of the model beside a plain SGD copy, in one process, step by step in
turn: SGD, refresh, SGD, plain. Ratios are CPU seconds of all threads over those of the SGD steps next to it,
medians over the rounds; the amortised ratio at period f is ``(refresh + (f - 1) plain) / f``. Two SGD copies
against each other show the noise. ``HyLo alone`` is the CPU time inside HyLo's own phases, capture included,
over that of an SGD step: no difference of two large numbers, so the figure to trust.

Stagger. ``HyLo alone`` at refresh_every 10 with staggering: the mean and the worst of the ten steps of a
period, plus 1 for the SGD step. ResNet-32: each step the lower of two periods.

Memory. Peak resident memory of a process of its own for each case, less that of plain SGD; beside it the
bytes that HyLo reports to hold between steps.

Bytes. Handed to collectives per refresh by rank 0 of 1, 2 and 4 ranks, and what the formula says.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

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
from hpcsngd.optim import HyLo
from tests.ranks import run_on_ranks

CASES: dict[str, dict[str, Any]] = {
    "sngd": {"method": "sngd"},
    "kis": {"method": "kis", "ratio": 0.1},
    "kid": {"method": "kid", "ratio": 0.1},
    "sngd exact": {"method": "sngd", "conv_mode": "exact"},
}
PERIODS = (1, 10, 100)
#: Plain SGD beside SGD: what differences mean nothing.
BASE = "sgd"


def build(case: str, model: nn.Module, **others: Any) -> HyLo:
    """Returns a case for a model; every second step refreshes unless ``others`` say otherwise."""
    common: dict[str, Any] = {"refresh_every": 2, "rescale": "norm", "profile": True}
    return HyLo(model, **common | CASES[case] | others)


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


def measure_times(shape: Shape, case: str, rounds: int, batch: int) -> Times:
    """Returns the times of a case."""
    builder = None if case == BASE else partial(build, case)
    base: Trainer[HyLo] = Trainer(shape, None, batch)
    other = Trainer(shape, builder, batch)
    samples = []
    for index in range(rounds + 1):
        first, refresh, second, plain = base.step(), other.step(), base.step(), other.step()
        sgd = (first[0] + second[0]) / 2
        if index:  # the first round warms up
            inside = [sum(phases.values()) for _, phases in (refresh, plain)]
            samples.append((sgd, *(seconds / sgd for seconds in (refresh[0], plain[0], *inside))))
    return Times(*(statistics.median(column) for column in zip(*samples, strict=True)))


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
    trainer = Trainer(SHAPES[model], partial(build, case), batch)
    sent = []
    for _ in range(2):
        trainer.step()
        sent.append(trainer.sent())
    state = trainer.method.state_dict()
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
    for case in [BASE, *cases]:
        times = measure_times(SHAPES[model], case, rounds, batch)
        amortised = "".join(f"{times.amortised(period):>11.3f}" for period in PERIODS)
        inside = f"{times.refresh_inside:>21.3f}{times.plain_inside:>8.3f}"
        print(
            f"{case:<12}{times.sgd_s:>8.3f}{times.refresh:>9.3f}{times.plain:>8.3f}{amortised}{inside}",
            flush=True,
        )


def print_bytes(model: str, cases: list[str], batch: int) -> None:
    print(f"\n{model}, batch {batch} per rank, refresh every 2 steps: bytes that rank 0 hands to collectives")
    print(f"{'case':<12}{'ranks':>6}{'owned':>7}{'refresh':>14}{'formula':>28}{'plain':>12}{'formula':>12}")
    for case in cases:
        for ranks in RANKS:
            seen = run_on_ranks(traffic, ranks, model, case, batch)[0]
            least, most, plain = formula(case, ranks, batch, seen)
            text = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            counts = f"{ranks:>6}{len(seen.owners):>4}/{len(seen.rows)}{seen.refresh:>14,}"
            print(f"{case:<12}{counts}{text:>28}{seen.plain:>12,}{plain:>12,}", flush=True)


def main() -> None:
    options = arguments(__doc__, CASES, ["resnet32", "resnet50"])
    for model in options.models:
        rounds, batch = size_of_run(options, model)
        if "time" in options.parts:
            print_times(model, options.cases, rounds, batch)
        if "stagger" in options.parts:
            spread: dict[str, Any] = {"refresh_every": PERIOD, "stagger": True}
            print_stagger(model, {case: partial(build, case, **spread) for case in options.cases}, batch)
        if "memory" in options.parts:
            print_memory(model, {case: partial(build, case) for case in options.cases}, batch)
        if "bytes" in options.parts:
            # Formulas hold for any batch; four copies of a full one would not fit small machines.
            print_bytes(model, options.cases, min(batch, 16 if model == "resnet32" else 4))


if __name__ == "__main__":
    main()
