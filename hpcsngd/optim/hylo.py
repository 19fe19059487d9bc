"""HyLo: damped natural gradient in sample space, exact (SNGD) or on an importance sample of the batch (KIS).

Source: Mu, Soori, Can, Gurbuzbalaban, Mehri Dehnavi, "HyLo: A Hybrid Low-Rank Natural Gradient Descent
Method", SC 2022. The formulas are in `hpcsngd.optim.linalg`, what is captured in `hpcsngd.optim.capture`.

Ranks. Every rank gathers the (kept) rows of all ranks, because it needs them to precondition at every step,
and then factorizes every layer's n x n kernel itself. Sending a kernel from an owner costs 4 n^2 bytes per
layer against n^3/3 floating point operations for doing it again: at 10 GB/s and 10 TFLOP/s the copy only pays
off above some ten thousand rows. KIS decides on the gathered scores and sends nothing but kept rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcsngd import dist
from hpcsngd.optim.base import Preconditioner, Schedule, value_at
from hpcsngd.optim.calls import ConvMode
from hpcsngd.optim.capture import Capture
from hpcsngd.optim.communicate import Communicator
from hpcsngd.optim.covering import Skip, find_layers
from hpcsngd.optim.curvature import SampleCurvature, kernel_of
from hpcsngd.optim.gather import JoinedBatch, join_batch
from hpcsngd.optim.layers import Layer
from hpcsngd.optim.observe import Observer
from hpcsngd.optim.records import Communication, Fallback, Memory, PhaseTime, StepRecord
from hpcsngd.optim.selection import draw_rows, rows_to_keep
from hpcsngd.optim.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Method = Literal["sngd", "kis"]
LossReduction = Literal["mean", "sum"]
Rescale = Literal["none", "damping", "norm"]

_STATE_FORMAT = "hylo/1"


class HyLo(Preconditioner):
    """Preconditions each covered layer's gradient by ``(F + damping I)^-1`` in sample space.

    ``F = 1/N sum_i u_i u_i^T`` over the N samples of the last refresh, all ranks and micro-batches together,
    where ``u_i`` is the gradient of sample i's *own* loss. Damping is in units of F's eigenvalues and so
    means the same for any batch size, number of ranks, accumulation and loss reduction. A sample is an entry
    of the first dimension of a layer's input.

    The scale of samples. Captured output gradients are those of the loss given to ``backward()``. The default
    turns them into gradients of each sample's own loss as follows; ``step(sample_scale=...)`` overrides it.

    * ``"mean"``: the loss is the mean over the micro-batch, divided by ``accumulation_steps``; the factor is
      rows in the micro-batch times ``accumulation_steps``. DistributedDataParallel averages parameter
      gradients and leaves output gradients alone, so the number of ranks does not enter.
    * ``"sum"``: the loss is the sum over the samples; the factor is 1. The gradient is then a sum as well and
      its preconditioned form grows with the number of samples.
    * A loop that weighs samples exactly over uneven ranks, ``loss = sum(own losses) * ranks / N`` for every
      micro-batch, says ``sample_scale = N / ranks``.

    Where a sample has several positions (pixels of a convolution, tokens of a Linear, calls of a layer used
    more than once) ``conv_mode`` says what stands for its gradient ``sum_s g_s x_s^T``:

    * ``"reduce"``: ``(sum_s g_s)(mean_s x_s)^T``, as if every position had the mean output gradient. One
      outer product per sample as in HyLo, but with the sum of the output gradients where HyLo's published
      code has their mean. That keeps it the size of a true per-sample gradient (exact for the bias), so one
      damping fits convolutions and linear layers.
    * ``"exact"``: the true gradient, so F is the layer's true empirical Fisher and a given damping means
      exactly what it says. Costs about a second weight gradient at refreshes, and memory for a gradient of
      the layer per sample of all ranks (`hpcsngd.optim.rows`). One backward pass per forward pass only.
    * ``"paper"``: ``(mean_s g_s)(mean_s x_s)^T``, what HyLo's published code computes. With S positions F is
      S^2 times smaller than in ``"reduce"``: at one damping for all layers, the early convolutions get
      little more than ``g / damping``. For comparisons; a damping tuned for it fits no other mode.

    KIS keeps ``max(1, round(ratio * N))`` samples, drawn without replacement with probability in proportion
    to ``||a_i||^2 ||g_i||^2``, and proceeds as if they were the whole batch (no re-weighting, as published).

    Failure. A layer whose rows are not finite, or whose kernel cannot be factorized even with jitter, keeps
    its last good curvature; without one it keeps its plain gradient. All ranks agree; the event is logged
    with layer, ranks and step, and counted in `diagnostics`. A layer that no sample used at a refresh
    keeps its curvature too and is not a failure.

    Args:
        model: the model, or its DistributedDataParallel wrapper (names are those inside it).
        method: ``"sngd"`` (every sample) or ``"kis"``.
        damping: positive, or a function of the step, evaluated at refreshes and used until the next.
        refresh_every: steps between refreshes, or a function of the step; the first step refreshes.
        ratio: share of the joined batch that KIS keeps, in (0, 1].
        conv_mode: see above.
        skip: layers to leave to the optimizer: regular expressions found anywhere in a module's name, names
            of module classes, or module classes; what is inside a skipped module is skipped as well.
        loss_reduction: see above.
        accumulation_steps: micro-batches per step.
        rescale: what becomes of the preconditioned gradient v of a layer. ``"none"``: v. ``"damping"``:
            damping * v, which tends to the plain gradient for large damping, so that covered and other
            parameters share a learning rate while damping changes. ``"norm"``: v scaled to
            the plain gradient's norm.
        dtype: of rows, kernels and solves; default: float32, or float64 for float64 weights.
        seed: of KIS's draws.
        profile: whether to time the phases (waits for the GPU at each).
        observe: any of ``"rank_analysis"``, ``"grad_norm"``, ``"grad_error"``; see `hpcsngd.optim.records`.

    Raises:
        ValueError: an argument out of its range, or no layer to cover.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: Method = "sngd",
        damping: Schedule = 0.1,
        refresh_every: Schedule = 1,
        ratio: float = 1.0,
        conv_mode: ConvMode = "reduce",
        skip: Sequence[Skip] = (),
        loss_reduction: LossReduction = "mean",
        accumulation_steps: int = 1,
        rescale: Rescale = "none",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        profile: bool = False,
        observe: Collection[str] = (),
    ) -> None:
        _check_choice("method", method, get_args(Method))
        _check_choice("conv_mode", conv_mode, get_args(ConvMode))
        _check_choice("loss_reduction", loss_reduction, get_args(LossReduction))
        _check_choice("rescale", rescale, get_args(Rescale))
        if not 0 < ratio <= 1 or (method == "sngd" and ratio != 1):
            raise ValueError(
                f"ratio={ratio}: must be in (0, 1], and 1 for method 'sngd', which keeps every sample"
            )
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps}: must be at least 1")
        self._method, self._ratio, self._rescale = method, ratio, rescale
        self._damping_schedule, self._refresh_every = damping, refresh_every
        self._loss_reduction, self._accumulation_steps = loss_reduction, accumulation_steps
        self._seed = seed
        self._step, self._failures = 0, 0
        self._last_refresh: int | None = None
        self._damping = _positive("damping", damping, 0)
        _at_least_one_step(refresh_every, 0)
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._layers, self.skipped = find_layers(inner, skip)
        self._observer = Observer(observe, method)
        self._stopwatch = Stopwatch(profile)
        self._communicator = Communicator()
        self._capture = Capture(self._layers, dtype, self._stopwatch, conv_mode)
        self._curvature: dict[str, SampleCurvature] = {}
        self._exact: dict[str, SampleCurvature] = {}
        self._record = StepRecord(0, False, self._damping, 0)
        self._closed = self._told_accumulation = False
        if self.skipped and dist.rank() == 0:
            text = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            logger.info("left to the base optimizer: %s", text)

    def step(self, sample_scale: float | None = None, grad_scale: float = 1.0) -> None:
        """Overwrites ``.grad`` of the covered parameters by the preconditioned gradient.

        Args:
            sample_scale: captured output gradients times this are gradients of each sample's own loss;
                default: by ``loss_reduction``.
            grad_scale: the factor of a gradient scaler (``GradScaler.get_scale()`` before its update) that
                captured output gradients still carry; ``.grad`` must already be unscaled.

        Raises:
            ValueError: a scale is not positive, or a schedule left its range.
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("this preconditioner is closed")
        for name, scale in (("sample_scale", sample_scale), ("grad_scale", grad_scale)):
            if scale is not None and not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"{name}={scale}: must be positive")
        refreshed = False
        fallbacks: tuple[Fallback, ...] = ()
        with torch.no_grad(), torch.autocast(self._layers[0].module.weight.device.type, enabled=False):
            if self._capture.enabled:
                refreshed, fallbacks = self._refresh(sample_scale, grad_scale)
            for layer in self._layers:
                self._precondition(layer)
        self._step += 1
        self._capture.enabled = self._refresh_is_due()
        self._record = self._make_record(refreshed, fallbacks)

    def state_dict(self) -> dict[str, Any]:
        """Returns the step, the draw's seed, damping, and every layer's joined rows and factor."""
        return {
            "format": _STATE_FORMAT,
            "step": self._step,
            "last_refresh": self._last_refresh,
            "seed": self._seed,
            "damping": self._damping,
            "failures": self._failures,
            "layers": {name: curvature.state_dict() for name, curvature in self._curvature.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state``, bit for bit on the same machine; any number of ranks may have saved it.

        Raises:
            ValueError: another format, or layers that this model does not have in this shape.
        """
        if state.get("format") != _STATE_FORMAT:
            raise ValueError(f"state has format {state.get('format')!r}; this is {_STATE_FORMAT!r}")
        layers = {layer.name: layer for layer in self._layers}
        unknown = sorted(set(state["layers"]) - set(layers))
        if unknown:
            raise ValueError(f"state has layers that are not covered here: {', '.join(unknown)}")
        self._curvature = {
            name: self._load_layer(layers[name], saved) for name, saved in state["layers"].items()
        }
        self._exact = {}
        self._step, self._last_refresh = state["step"], state["last_refresh"]
        self._seed, self._damping, self._failures = state["seed"], state["damping"], state["failures"]
        self._capture.clear()
        self._capture.enabled = self._refresh_is_due()
        self._record = self._make_record(refreshed=False, fallbacks=())

    def diagnostics(self) -> StepRecord:
        """Returns the record of the latest step."""
        return self._record

    def close(self) -> None:
        """Removes every hook: the model is as before. Further steps raise RuntimeError."""
        self._capture.close()
        self._curvature, self._exact = {}, {}
        self._closed = True

    def _refresh(self, sample_scale: float | None, grad_scale: float) -> tuple[bool, tuple[Fallback, ...]]:
        """Recomputes the curvature from the captured rows; returns whether there were any, and failures."""
        damping = _positive("damping", self._damping_schedule, self._step)
        self._check_accumulation(sample_scale)
        with self._stopwatch.phase("capture"):
            local = self._capture.take(partial(self._own_loss_scale, sample_scale, grad_scale))
        choose = self._choose if self._method == "kis" and self._ratio < 1 else None
        with self._stopwatch.phase("gather"):
            batch = join_batch(self._communicator, local, choose, everything=self._observer.wants_exact)
        if not batch.kept and not batch.faults:
            return False, ()
        with self._stopwatch.phase("factorise"):
            faults = {**batch.faults, **self._factorise(batch, damping)}
        if self._observer.wants_exact:
            with self._stopwatch.phase("observe"):
                self._factorise_exact(batch, damping)
        self._damping, self._last_refresh = damping, self._step
        self._failures += len(faults)
        return True, tuple(self._fall_back(name, reason) for name, reason in faults.items())

    def _factorise(self, batch: JoinedBatch, damping: float) -> dict[str, str]:
        """Replaces the curvature of every layer that has rows; returns where that failed, and why."""
        built: dict[str, SampleCurvature | None] = {}
        for name, rows in batch.kept.items():
            kernel = kernel_of(rows)
            built[name] = SampleCurvature.build(rows, kernel, damping)
            if built[name] is not None:
                with self._stopwatch.phase("observe"):
                    self._observer.kernel(name, kernel, damping)
        # The same rows on unlike hardware may fail on one rank only: one rank's failure is everybody's.
        failed = self._communicator.sum_numbers("factorise", [int(new is None) for new in built.values()])
        for (name, new), ranks in zip(built.items(), failed, strict=True):
            if new is not None and not ranks:
                self._curvature[name] = new
        return {
            name: "kernel is not positive definite"
            for name, ranks in zip(built, failed, strict=True)
            if ranks
        }

    def _factorise_exact(self, batch: JoinedBatch, damping: float) -> None:
        """Keeps, beside a compressed curvature, the exact one of the same batch."""
        self._exact = {}
        for name, rows in batch.everything.items():
            exact = SampleCurvature.build(rows, kernel_of(rows), damping)
            if exact is not None:
                self._exact[name] = exact

    def _fall_back(self, name: str, reason: str) -> Fallback:
        if dist.rank() == 0:
            instead = "last good curvature" if name in self._curvature else "plain gradient"
            logger.warning("step %d, layer %s: %s; using its %s", self._step + 1, name, reason, instead)
        return Fallback(self._step + 1, name, reason)

    def _precondition(self, layer: Layer) -> None:
        """Overwrites one layer's gradient, if it has a gradient and a curvature."""
        gradients = [parameter.grad for parameter in layer.parameters if parameter.grad is not None]
        if len(gradients) < len(layer.parameters):
            return
        curvature = self._curvature.get(layer.name)
        with self._stopwatch.phase("precondition"):
            grad = layer.to_matrix(gradients).to(self._capture.rows_dtype(layer))
            result = grad if curvature is None else curvature.solve(grad)
            if curvature is not None:
                rescaled = self._rescaled(result, grad, curvature.damping)
                for gradient, piece in zip(gradients, layer.from_matrix(rescaled), strict=True):
                    gradient.copy_(piece)
        with self._stopwatch.phase("observe"):
            self._observer.gradient(layer.name, grad)
            if layer.name in self._exact:
                self._observer.error(layer.name, result, self._exact[layer.name].solve(grad))

    def _rescaled(self, result: Tensor, grad: Tensor, damping: float) -> Tensor:
        if self._rescale == "damping":
            return result * damping
        if self._rescale == "norm":
            ratio: Tensor = grad.norm() / result.norm().clamp_min(torch.finfo(result.dtype).tiny)
            return result * ratio
        return result

    def _choose(self, layer: str, scores: Tensor) -> Tensor:
        keep = rows_to_keep(len(scores), self._ratio)
        return draw_rows(scores, keep, seed=self._seed, step=self._step, layer=layer)

    def _own_loss_scale(self, sample_scale: float | None, grad_scale: float, rows: int) -> float:
        """Returns what turns captured output gradients into gradients of each sample's own loss."""
        if sample_scale is None:
            sample_scale = rows * self._accumulation_steps if self._loss_reduction == "mean" else 1.0
        return sample_scale / grad_scale

    def _check_accumulation(self, sample_scale: float | None) -> None:
        """Tells once about more micro-batches than announced: their scale, hence damping, would be wrong."""
        seen, announced = self._capture.micro_batches, self._accumulation_steps
        if (
            sample_scale is None
            and self._loss_reduction == "mean"
            and seen > announced
            and not self._told_accumulation
        ):
            self._told_accumulation = True
            logger.warning("captured %d micro-batches, but accumulation_steps=%d", seen, announced)

    def _refresh_is_due(self) -> bool:
        if self._last_refresh is None:
            return True
        return self._step - self._last_refresh >= _at_least_one_step(self._refresh_every, self._step)

    def _load_layer(self, layer: Layer, saved: Mapping[str, Any]) -> SampleCurvature:
        weight = layer.module.weight
        like = torch.empty(0, device=weight.device, dtype=self._capture.rows_dtype(layer))
        try:
            return SampleCurvature.from_state(saved, layer.row_sizes, layer.groups, like)
        except ValueError as error:
            raise ValueError(f"state of layer {layer.name}: {error}") from error

    def _make_record(self, refreshed: bool, fallbacks: tuple[Fallback, ...]) -> StepRecord:
        step = self._step
        sizes = {"rows": 0, "factors": 0}
        for curvature in (*self._curvature.values(), *self._exact.values()):
            for kind, size in zip(sizes, curvature.size_bytes, strict=True):
                sizes[kind] += size
        traffic = self._communicator.take_traffic()
        return StepRecord(
            step,
            refreshed,
            self._damping,
            self._failures,
            jittered=sum(curvature.jitter > 0 for curvature in self._curvature.values()),
            phases=tuple(PhaseTime(step, *item) for item in self._stopwatch.take().items()),
            communication=tuple(Communication(step, *what, *amount) for what, amount in traffic.items()),
            memory=tuple(Memory(step, *item) for item in sizes.items()),
            rank_analysis=self._observer.take_rank_analysis(step),
            grad_norm=self._observer.take_grad_norm(step),
            grad_error=self._observer.take_grad_error(step),
            fallbacks=fallbacks,
        )


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")


def _positive(name: str, schedule: Schedule, step: int) -> float:
    value = value_at(schedule, step)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} at step {step}: must be positive")
    return value


def _at_least_one_step(schedule: Schedule, step: int) -> float:
    value = value_at(schedule, step)
    if not value >= 1:
        raise ValueError(f"refresh_every={value} at step {step}: must be at least 1")
    return value
