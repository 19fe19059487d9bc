"""What the benchmarks of optimizers share: models in training, interleaved timing, memory, command line.

Times are CPU seconds of all threads: other work shares the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from hpcsngd import dist
from hpcsngd.optim import stopwatch
from hpcsngd.optim.base import Preconditioner
from hpcsngd.train import models

P = TypeVar("P", bound=Preconditioner)

RANKS = (1, 2, 4)
PARTS = ("time", "stagger", "memory", "bytes")
#: Steps of a staggered period.
PERIOD = 10


@dataclass(frozen=True)
class Shape:
    """A model of 10 classes, by its name in experiments, the images it sees here, and how long it is timed.

    Attributes:
        model: its name.
        batch: samples per step.
        pixels: of a side of an image.
        rounds: of timing, unless the command line says otherwise.
        periods: of staggering; the lower time of a slot counts.
    """

    model: str
    batch: int
    pixels: int
    rounds: int
    periods: int

    def build(self) -> nn.Module:
        """Returns the model with fresh weights."""
        return models.build_model(self.model, 10, 3, self.pixels)


SHAPES = {
    "resnet20": Shape("resnet20", 128, 32, 7, 2),
    "resnet32": Shape("resnet32", 128, 32, 7, 2),
    "resnet50": Shape("torchvision/resnet50", 16, 64, 3, 1),
}


class Trainer(Generic[P]):
    """A model in training on one fixed batch of noise, with a method or without.

    Args:
        shape: of the model and its images.
        build: model -> method that is told to profile; None: plain SGD.
        batch: samples per step.
        lr: of SGD.
    """

    def __init__(
        self, shape: Shape, build: Callable[[nn.Module], P] | None, batch: int, lr: float = 1e-3
    ) -> None:
        torch.manual_seed(0)
        self.model = shape.build()
        # Not the same samples on every rank.
        self.x = torch.randn(batch, 3, shape.pixels, shape.pixels) + dist.rank()
        self.target = torch.randint(0, 10, (batch,))
        self._method = None if build is None else build(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)

    @property
    def method(self) -> P:
        """Returns the method; only for a case that has one."""
        assert self._method is not None
        return self._method

    def step(self) -> tuple[float, dict[str, float]]:
        """Trains one step; returns the CPU seconds of it and of each of the method's phases in it."""
        begin, phases = time.process_time(), {}
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.target).backward()  # type: ignore[no-untyped-call]
        if self._method is not None:
            self._method.step()
            phases = {phase.phase: phase.seconds for phase in self._method.diagnostics().phases}
        self.optimizer.step()
        return time.process_time() - begin, phases

    def sent(self) -> int:
        """Returns the bytes that the method handed to collectives in the latest step."""
        return sum(item.size_bytes for item in self.method.diagnostics().communication)

    def held(self) -> int:
        """Returns the bytes that the method holds between steps; 0 without one."""
        record = None if self._method is None else self._method.diagnostics()
        return 0 if record is None else sum(kind.size_bytes for kind in record.memory)


def measure_stagger(shape: Shape, build: Callable[[nn.Module], P], batch: int) -> tuple[float, float]:
    """Returns the mean and the worst step of a staggered period over an SGD step.

    Args:
        shape: of the model and its images.
        build: model -> method, staggered over `PERIOD` steps.
        batch: samples per step.
    """
    base: Trainer[P] = Trainer(shape, None, batch)
    case = Trainer(shape, build, batch)
    base.step()
    case.step()
    steps = [(base.step()[0], sum(case.step()[1].values())) for _ in range(shape.periods * PERIOD)]
    sgd = statistics.median(seconds for seconds, _ in steps)
    ratios = [1 + min(inside for _, inside in steps[slot::PERIOD]) / sgd for slot in range(PERIOD)]
    return statistics.mean(ratios), max(ratios)


def peak_mb(shape: Shape, build: Callable[[nn.Module], P] | None, batch: int) -> tuple[float, float]:
    """Returns the peak memory of four training steps in a fresh process, and what the method holds, in MB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (shape, build, batch))


def _peak_here(shape: Shape, build: Callable[[nn.Module], P] | None, batch: int) -> tuple[float, float]:
    trainer = Trainer(shape, build, batch)
    for _ in range(4):
        trainer.step()
    # Not getrusage: its peak begins with that of the process that started this one.
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak_kib) * 1024 / 1e6, trainer.held() / 1e6


def print_stagger(model: str, cases: Mapping[str, Callable[[nn.Module], P]], batch: int) -> None:
    """Prints the mean and the worst step of every case, staggered over `PERIOD` steps."""
    print(f"\n{model}, batch {batch}, staggered over {PERIOD} steps: over an SGD step")
    print(f"{'case':<12}{'mean step':>11}{'worst step':>12}", flush=True)
    for case, build in cases.items():
        mean, worst = measure_stagger(SHAPES[model], build, batch)
        print(f"{case:<12}{mean:>11.3f}{worst:>12.3f}", flush=True)


def print_memory(model: str, cases: Mapping[str, Callable[[nn.Module], P]], batch: int) -> None:
    """Prints the peak memory of every case, above that of SGD, and what is held between steps."""
    print(f"\n{model}, batch {batch}, one rank: MB")
    print(f"{'case':<12}{'peak':>8}{'above SGD':>11}{'held':>8}")
    base, _ = peak_mb(SHAPES[model], None, batch)
    print(f"{'sgd':<12}{base:>8.0f}{0:>11.0f}{0:>8.1f}", flush=True)
    for case, build in cases.items():
        peak, held = peak_mb(SHAPES[model], build, batch)
        print(f"{case:<12}{peak:>8.0f}{peak - base:>11.0f}{held:>8.1f}", flush=True)


def arguments(
    description: str | None, cases: Iterable[str], models: Iterable[str], parts: Iterable[str] = PARTS
) -> argparse.Namespace:
    """Reads the command line, and sets threads and the clock of the phases.

    Args:
        description: of the benchmark.
        cases: allowed ones; all of them unless the command line says otherwise.
        models: the same.
        parts: the same.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    for name, allowed in (("models", list(models)), ("cases", list(cases)), ("parts", list(parts))):
        parser.add_argument(f"--{name}", nargs="+", choices=allowed, default=allowed)
    parser.add_argument("--rounds", type=int, help="of timing; default: by model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="batch 16, 2 rounds: does it run at all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stopwatch._now = time.process_time  # noqa: SLF001 - phases are timed by the wall otherwise
    return options


def size_of_run(options: argparse.Namespace, model: str) -> tuple[int, int]:
    """Returns rounds and batch for a model."""
    shape = SHAPES[model]
    if options.quick:
        return 2, min(16, shape.batch)
    return options.rounds or shape.rounds, shape.batch
