"""How second-order an experiment is: how much its preconditioner changes gradients beyond their length.

Run: ``python -m benchmarks.strength EXPERIMENT... [--data-root DIR] [--set KEY=VALUE] [--damping D...]``.

A damping far above the eigenvalues of the curvature leaves ``v = g / damping``: SGD in disguise. The
strength ``|damping v - g| / |g|`` over all covered parameters is 0 there and near 1 where curvature decides.
It is measured on the experiment's own model, data, loss and settings, on one batch, with nothing rescaled or
clipped.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcsngd import optim
from hpcsngd.config.experiment import Experiment
from hpcsngd.config.resolve import override, resolve
from hpcsngd.train import data, optimizers, seeds, tasks
from hpcsngd.train.data import Splits
from hpcsngd.train.session import build_model

# Steps of plain SGD before a second measurement: at the start, layers have not found their scale.
_WARM_STEPS = 20
_WARM_LR = 0.01
# Squared length below which a gradient is nothing but the rounding of float32.
_ROUNDING = 1e-20


@dataclass(frozen=True)
class Strength:
    """How much a preconditioner changes the gradient of one batch.

    Attributes:
        damping: that it was done with.
        total: ``|damping v - g| / |g|`` over all covered parameters together.
        layers: covered module -> the same for it alone, 0 where its gradient came back as it was; without
            those whose gradient is rounding: a bias in front of a batch norm has none.
    """

    damping: float
    total: float
    layers: dict[str, float]

    @property
    def median(self) -> float:
        """Strength of the median layer."""
        return statistics.median(self.layers.values())

    def __str__(self) -> str:
        least, most = min(self.layers.values()), max(self.layers.values())
        return (
            f"damping {self.damping:.3g}: strength {self.total:.2g}, "
            f"of layers {least:.2g} to {most:.2g}, median {self.median:.2g}"
        )


class Subject:
    """An experiment's model, loss and one batch.

    Args:
        config: the experiment; ``batch_size`` samples are taken from the front of its training set's order.
        splits: its data.
    """

    def __init__(self, config: Experiment, splits: Splits) -> None:
        self._config = config
        seeds.seed_streams(seeds.derive(config.seed, "weights"))
        self.model = build_model(config, splits, torch.device("cpu"))
        self._task = tasks.build(config, splits.num_classes, splits.test)
        self._order = torch.randperm(len(splits.train), generator=seeds.generator(config.seed, "strength"))
        self._train = splits.train

    def warm_up(self, steps: int = _WARM_STEPS) -> None:
        """Takes steps of plain SGD."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=_WARM_LR, momentum=0.9)
        for index in range(steps):
            optimizer.zero_grad()
            self._backward(index + 1, None)
            optimizer.step()

    def strength(self, damping: float | None = None, epoch: float = 0.0) -> Strength:
        """Returns the strength of the experiment's preconditioner on the first batch.

        Args:
            damping: instead of the experiment's.
            epoch: for a damping by epochs.
        """
        preconditioner = optimizers.build_preconditioner(self.model, self._bare(damping), seed=0)
        if preconditioner is None:
            raise ValueError("the experiment has no preconditioner")
        self.model.zero_grad()
        preconditioner.set_progress(epoch, 1.0)
        try:
            scale = self._backward(0, preconditioner)
            covered = _covered(self.model, preconditioner.skipped)
            plain = dict(self._gradients(covered))
            preconditioner.step(sample_scale=scale)
            used = float(preconditioner.diagnostics().damping)
            found = dict(self._gradients(covered))
        finally:
            preconditioner.close()
        return compare(used, plain, found)

    def _bare(self, damping: float | None) -> Experiment:
        """Returns the experiment without what changes the length of a step."""
        method = self._config.preconditioner
        if method is None:
            return self._config
        changes = {"rescale": "none", "kl_clip": None, **({} if damping is None else {"damping": damping})}
        known = {key: value for key, value in changes.items() if key in type(method).model_fields}
        return self._config.model_copy(update={"preconditioner": method.model_copy(update=known)})

    def _backward(self, number: int, preconditioner: optim.Preconditioner | None) -> float:
        """Leaves the gradients of a batch; returns what makes them those of each sample's own loss."""
        size = min(self._config.batch_size, len(self._order))
        chosen = self._order.roll(-number * size)[:size].tolist()
        *inputs, targets = self._train[data.Wanted(chosen, 0)]
        divisor, scale = self._scales(chosen)
        if preconditioner is not None:
            preconditioner.begin_step(scale, 1)
        outputs = self.model(*inputs)
        if preconditioner is not None:
            preconditioner.before_backward(self._task.curvature_outputs(outputs, targets))
        (self._task.loss(outputs, targets) / divisor).backward()  # type: ignore[no-untyped-call]
        return scale

    def _scales(self, chosen: Sequence[int]) -> tuple[int, float]:
        """Returns what the sum of losses is divided by, as in training, and what `_backward` returns."""
        if self._config.loss.average == "none":
            return 1, 1.0
        counts = self._train.targets if self._config.loss.average == "tokens" else None
        return len(chosen) if counts is None else sum(counts[index] for index in chosen), float(len(chosen))

    def _gradients(self, covered: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if name in covered and parameter.grad is not None:
                yield name, parameter.grad.detach().clone()


def compare(damping: float, plain: dict[str, Tensor], found: dict[str, Tensor]) -> Strength:
    """Returns the strength of a preconditioned gradient.

    Args:
        damping: that it was made with.
        plain: parameter -> gradient.
        found: parameter -> preconditioned gradient, not rescaled.
    """
    changes: dict[str, float] = defaultdict(float)
    sizes: dict[str, float] = defaultdict(float)
    for name, gradient in plain.items():
        layer, result = name.rpartition(".")[0], found[name]
        # a layer without curvature keeps its plain gradient, which is not a step of length 1 / damping
        is_kept = torch.equal(result, gradient)
        changes[layer] += 0.0 if is_kept else float((damping * result - gradient).double().square().sum())
        sizes[layer] += float(gradient.double().square().sum())
    layers = {layer: math.sqrt(changes[layer] / size) for layer, size in sizes.items() if size > _ROUNDING}
    return Strength(damping, math.sqrt(sum(changes.values()) / sum(sizes.values())), layers)


def _covered(model: nn.Module, skipped: Mapping[str, str]) -> set[str]:
    """Returns the names of the parameters that a preconditioner does not leave alone."""
    return {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if not any(name == other or name.startswith(f"{other}.") for other in skipped)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strength", description=__doc__)
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("--damping", type=float, nargs="*", default=[], help="instead of the experiments'")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--warm", type=int, nargs="*", default=[0, 20], help="after so many steps of SGD")
    options = parser.parse_args(arguments)
    changes = [
        override(key, value, "--set") for key, _, value in (text.partition("=") for text in options.sets)
    ]
    for name in options.experiments:
        config = resolve("local", name, changes).experiment
        for steps in options.warm:
            subject = Subject(config, data.load(config.data, None, seed=config.seed))
            subject.warm_up(steps)
            for damping in options.damping or [None]:
                print(f"{name}, {steps} steps of SGD, {subject.strength(damping)}", flush=True)


if __name__ == "__main__":
    main()
