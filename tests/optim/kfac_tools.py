"""What tests of K-FAC have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpcsngd import dist
from hpcsngd.optim import KFAC
from hpcsngd.optim.packing import unpack
from tests.optim import oracle
from tests.optim.training import BUILDERS, average_gradients, share


def kept_factors(kfac: KFAC) -> dict[str, list[Tensor]]:
    """Returns A and G of every layer, as they are used."""
    shapes = {layer.name: layer.factor_shapes() for layer in kfac._layers}
    return {name: saved_factors(saved, shapes[name]) for name, saved in kfac.state_dict()["layers"].items()}


def saved_factors(layer: dict[str, Any], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Returns A and G of a layer from its state."""
    saved = layer["factors"]
    return [
        unpack(total, shape) / saved["weight"] for total, shape in zip(saved["sums"], shapes, strict=True)
    ]


def backward(model: nn.Module, seed: int = 1, count: int = 8, shape: tuple[int, ...] = (5,)) -> None:
    """Leaves the gradients of the mean loss of a random batch."""
    model.zero_grad()
    oracle.mean_loss(model, *oracle.batch(model, (count, *shape), seed)).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def train(
    kind: str, sizes: list[int], steps: int, options: dict[str, Any], state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains by SGD with K-FAC on exactly averaged, possibly uneven batches, as `training.train` does.

    Args:
        kind: key of BUILDERS.
        sizes: samples of each rank.
        steps: after this many the run ends.
        options: of K-FAC.
        state: ``model`` and ``kfac`` to resume from.
    """
    build, shape = BUILDERS[kind]
    model = build()
    kfac = KFAC(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if state is not None:
        model.load_state_dict(state["model"])
        kfac.load_state_dict(state["kfac"])
    count, records = sum(sizes), []
    for step in range(state["kfac"]["step"] if state else 0, steps):
        x, target = oracle.batch(build(), (count, *shape), seed=step)
        mine = share(sizes)
        optimizer.zero_grad()
        outputs = model(x[mine])
        kfac.before_backward(outputs)
        losses = 0.5 * (outputs.flatten(1) - target[mine]).square().sum(1)
        (losses.sum() * dist.world_size() / count).backward()
        average_gradients(model)
        kfac.set_progress(step / 3, 0.02)
        kfac.step(sample_scale=count / dist.world_size())
        optimizer.step()
        records.append(kfac.diagnostics())
    return {
        "gradients": [p.grad for p in model.parameters()],
        "state": {"model": model.state_dict(), "kfac": kfac.state_dict()},
        "records": records,
    }
