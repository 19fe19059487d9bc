"""A few training steps on this rank's share of fixed batches: the same function for 1..N ranks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd import dist
from hpcsngd.optim import HyLo
from tests.optim import models, oracle

BUILDERS: dict[str, Any] = {
    "mlp": (models.mlp, (5,)),
    "conv": (lambda: models.conv_net(kernel_size=3, stride=2, padding=1), (3, 8, 7)),
    "tokens": (lambda: models.seeded(models.Tokens), (2, 5)),
}


def share(sizes: list[int]) -> slice:
    """Returns this rank's part of a batch of ``sum(sizes)`` samples; everything without a group."""
    if not dist.is_initialized():
        return slice(0, sum(sizes))
    start = sum(sizes[: dist.rank()])
    return slice(start, start + sizes[dist.rank()])


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.all_reduce_sum(parameter.grad)
        parameter.grad /= dist.world_size()


def train(
    kind: str, sizes: list[int], steps: int, options: dict[str, Any], state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains by SGD with HyLo on exactly averaged, possibly uneven batches.

    Args:
        kind: key of BUILDERS.
        sizes: samples of each rank.
        steps: after this many the run ends.
        options: of HyLo.
        state: ``model`` and ``hylo`` to resume from.

    Returns:
        The last preconditioned gradients, the states, and the last diagnostics.
    """
    build, shape = BUILDERS[kind]
    model = build()
    hylo = HyLo(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if state is not None:
        model.load_state_dict(state["model"])
        hylo.load_state_dict(state["hylo"])
    count = sum(sizes)
    records = []
    for step in range(state["hylo"]["step"] if state else 0, steps):
        x, target = oracle.batch(build(), (count, *shape), seed=step)
        mine = share(sizes)
        optimizer.zero_grad()
        loss = oracle.own_losses(model, x[mine], target[mine]).sum() * dist.world_size() / count
        loss.backward()
        average_gradients(model)
        hylo.step(sample_scale=count / dist.world_size())
        optimizer.step()
        records.append(hylo.diagnostics())
    return {
        "gradients": [p.grad for p in model.parameters()],
        "state": copy.deepcopy({"model": model.state_dict(), "hylo": hylo.state_dict()}),
        "records": records,
    }


def step_on_sequences(lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Steps once; rank r has three sequences of ``lengths[r]`` tokens, one process has them all."""
    model = models.seeded(models.Tokens)
    hylo = HyLo(model, damping=0.05, loss_reduction="sum", **options)
    for length in lengths[dist.rank() :: dist.world_size()]:
        oracle.sum_loss(model, *oracle.batch(model, (3, length, 5), seed=length)).backward()
    average_gradients(model)
    hylo.step()
    return {
        "gradients": [p.grad * dist.world_size() for p in model.parameters()],
        "record": hylo.diagnostics(),
    }


def train_with_ddp(steps: int, accumulation_steps: int) -> list[Tensor]:
    """Trains as users do: mean loss, DDP, default scale, even batches of 8 in all, ``no_sync`` in between."""
    model = models.mlp()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    hylo = HyLo(wrapped, damping=0.05, accumulation_steps=accumulation_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    ranks, rank = dist.world_size(), dist.rank()
    for step in range(steps):
        optimizer.zero_grad()
        x, target = oracle.batch(models.mlp(), (8, 5), seed=step)
        # Strided over the micro-batches, so that one process with two of them sees what two ranks see.
        for micro in range(accumulation_steps):
            part = slice(rank * accumulation_steps + micro, None, ranks * accumulation_steps)
            wrapped.require_backward_grad_sync = micro == accumulation_steps - 1
            (oracle.mean_loss(wrapped, x[part], target[part]) / accumulation_steps).backward()
        hylo.step()
        optimizer.step()
    # Names do not carry the wrapper's prefix: states and draws are the same with and without it.
    assert set(hylo.state_dict()["layers"]) == {"0", "2"}
    return [p.detach() for p in model.parameters()]


def train_through_a_fault(steps: int, fault: str, placement: str = "replicate") -> dict[str, Any]:
    """Trains on all ranks; in the second step something goes wrong on the last rank only.

    Args:
        steps: after this many the run ends.
        fault: ``"rows"``, a sample of layer 2 is not finite, or ``"kernel"``, no kernel can be factorized.
        placement: of HyLo.
    """
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, placement=placement)
    gradients = []
    for step in range(steps):
        x, target = oracle.batch(models.mlp(), (6, 5), seed=step + 100 * dist.rank())
        model.zero_grad()
        oracle.mean_loss(model, x, target).backward()
        faulty = step == 1 and dist.rank() == dist.world_size() - 1
        if faulty and fault == "rows":
            hylo._capture._calls["2"][0][0].output_sums[0, 0] = float("nan")
        average_gradients(model)
        failing = mock.patch(
            "hpcsngd.optim.curvature.jittered_cholesky_each", lambda matrices: [None] * len(matrices)
        )
        with failing if faulty and fault == "kernel" else nullcontext():
            hylo.step()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return {"gradients": gradients, "failures": hylo.diagnostics().failures, "state": hylo.state_dict()}


def train_hybrid(sizes: list[int], steps: int) -> dict[str, Any]:
    """Trains with the online hybrid method, three steps per epoch on the same three batches."""
    model = models.mlp()
    hylo = HyLo(model, damping=0.05, method="hybrid", low_rank=4, switch={"eta": 0.3})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    count, methods, changes = sum(sizes), [], []
    for step in range(steps):
        x, target = oracle.batch(models.mlp(), (count, 5), seed=step % 3)
        mine = share(sizes)
        optimizer.zero_grad()
        loss = oracle.own_losses(model, x[mine], target[mine]).sum() * dist.world_size() / count
        loss.backward()
        average_gradients(model)
        hylo.set_progress(step / 3, 0.02)
        hylo.step(sample_scale=count / dist.world_size())
        optimizer.step()
        record = hylo.diagnostics()
        methods.append(record.method)
        changes += [decision.change for decision in record.switches]
    return {"methods": methods, "changes": changes, "gradients": [p.grad for p in model.parameters()]}


def verify_on_one_rank() -> list[float]:
    """Returns the errors that rank 0 finds while the other ranks do something else."""
    hylo = HyLo(models.mlp(), damping=0.05)
    checks = []
    if dist.rank() == 0:
        checks = list(
            hylo.verify(oracle.batch(models.mlp(), (6, 5)), lambda y, t: (y - t).square().sum(1).mean())
        )
    dist.barrier()
    return [check.error for check in checks]
