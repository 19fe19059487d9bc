"""M-FAC: natural gradient from the last m gradients, dense, sparse with error feedback, or of low rank.

Sources: Frantar, Kurtic & Alistarh, "M-FAC: Efficient matrix-free approximations of second-order
information", NeurIPS 2021; Modoranu et al., "Error feedback can accurately compress preconditioners" (EFCP),
ICML 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hpcsngd.optim.base import Schedule
from hpcsngd.optim.checks import check_choice, positive
from hpcsngd.optim.chosen import Parameters
from hpcsngd.optim.clipping import Clip
from hpcsngd.optim.covering import Skip
from hpcsngd.optim.factor import BLOCK, RingFactor
from hpcsngd.optim.stored import EntryFormat, Storage, StoreRule
from hpcsngd.optim.topk import MAX_BLOCK, Scope
from hpcsngd.optim.window import solve_shifted
from hpcsngd.optim.windowed import Windowed

#: What the sum of outer products is divided by: m always, or the number of gradients so far.
ScaleRule = Literal["window", "count"]

#: What is preconditioned: what was sent to the window, or the whole gradient.
Target = Literal["sent", "gradient"]

#: What helps while a sparse window fills; see `MFAC`.
Early = Literal["none", "gradient", "error", "dense"]

#: A factor is kept for windows of more blocks than this.
_FEW_BLOCKS = 8


class MFAC(Windowed):
    """Preconditions the gradient by ``(damping I + 1/s sum_i g_i g_i^T)^-1`` over the last m gradients.

    The gradients are those that ``step()`` finds, averaged over batch and ranks; the newest is in the window
    when it is preconditioned. Damping is in units of the eigenvalues of the mean outer product of *batch*
    gradients; unlike with HyLo and K-FAC these depend on the batch size: less noise, smaller eigenvalues.

    Memory: dense ``4 m d`` bytes; sparse ``b m k + 4 d`` with b bytes per entry (8, 6 or 4) and
    ``k = density d``; low rank ``4 m rank sum(n_1 + n_2) + 4 d``; always ``8 m^2`` for the Gram matrix, and
    from m = 257 on about as much for its factor (`hpcsngd.optim.factor`).

    Args:
        parameters: a model or its DistributedDataParallel wrapper, or parameters.
        num_grads: m.
        damping: number or function of the step.
        storage: ``dense``, ``sparse`` or ``lowrank``.
        scale_rule: s is m (``window``), or the number of gradients in the window (``count``).
        density: share of the entries that sparse storage sends per step.
        entries: format of sparse storage; 16-bit positions are relative to their block.
        scope: where entries compete for being sent: in blocks, in layers, or all together.
        block_size: of scope ``block``; at most 32,768 with 16-bit positions.
        feedback: False drops what is not sent, to measure what feedback is worth.
        low_rank: rank of low-rank storage.
        target: precondition what was ``sent`` (default), or the whole ``gradient``.
        early: while the window of sparse storage fills, u is zero outside the entries sent so far. Remedies:
            ``gradient`` puts ``g / damping`` into those zeros; ``error`` puts the error over the damping
            there and takes it out of the error; ``dense`` preconditions the whole gradient until the window
            is full.
        feedback_scale: factor of a gradient as it enters the error, number or function of the step; 1 leaves
            the learning rate to the optimizer (EFCP's first version).
        weight_decay: coupled: preconditioned, not stored; see `hpcsngd.optim.decay`.
        clip_norm: largest norm of the result.
        clip_value: largest absolute entry of the result.
        skip: modules by class or regular expression, such as ``["BatchNorm2d"]``, whose parameters train with
            their plain gradient; needs a model.
        dtype: of window and products; default: the parameters', at least float32.
        seed: of low-rank storage's first subspace.
        profile: whether to time the phases.

    Raises:
        ValueError: an argument out of its range, named with what is allowed.
    """

    format = "mfac/1"

    def __init__(
        self,
        parameters: Parameters,
        num_grads: int = 1024,
        *,
        damping: Schedule = 1e-4,
        storage: Storage = "dense",
        scale_rule: ScaleRule = "window",
        density: float = 0.01,
        entries: EntryFormat = "fp32+int32",
        scope: Scope = "block",
        block_size: int = MAX_BLOCK,
        feedback: bool = True,
        low_rank: int = 1,
        target: Target = "sent",
        early: Early = "none",
        feedback_scale: Schedule = 1.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        skip: Sequence[Skip] = (),
        dtype: torch.dtype | None = None,
        seed: int = 0,
        profile: bool = False,
    ) -> None:
        check_choice("scale_rule", scale_rule, get_args(ScaleRule))
        check_choice("target", target, get_args(Target))
        check_choice("early", early, get_args(Early))
        if early != "none" and storage != "sparse":
            raise ValueError(f"early={early!r}: is for sparse storage")

        rule = StoreRule(storage, density, entries, scope, block_size, feedback, low_rank, seed)
        super().__init__(
            parameters,
            num_grads,
            rule,
            dtype=dtype,
            skip=skip,
            scale=feedback_scale,
            weight_decay=weight_decay,
            clip=Clip(clip_norm, clip_value),
            profile=profile,
        )
        positive("damping", damping, 0)
        self._damping_schedule = damping
        self._scale_rule, self._target, self._early = scale_rule, target, early
        # below, all anew is as fast; on a GPU nobody has measured it
        is_large = num_grads > _FEW_BLOCKS * BLOCK and self._flat.device.type == "cpu"
        self._factor = RingFactor(self._ring) if is_large else None

    def _damping(self) -> float:
        return positive("damping", self._damping_schedule, self._step)

    @property
    def _divisor(self) -> int:
        return self._ring.capacity if self._scale_rule == "window" else self._ring.count

    def _direction(self, gradient: Tensor) -> Tensor | None:
        is_filling = self._ring.count < self._ring.capacity
        is_dense = self._target == "gradient" or (self._early == "dense" and is_filling)
        result = self._solve_outside(gradient) if is_dense else self._solve_newest()
        if result is None:
            return None
        if self._weight_decay:
            decay = self._solve_outside(self._flat.read_weights(self._dtype))
            if decay is None:
                return None
            result = result + self._weight_decay * decay
        if is_filling and self._early in ("gradient", "error"):
            result = self._filled(result, gradient)
        return result

    def _filled(self, result: Tensor, gradient: Tensor) -> Tensor:
        """Puts gradient or error over damping where the result is zero."""
        empty = result == 0
        source = gradient
        if self._early == "error" and self._store.error is not None:
            source = self._shard.join(self._store.error.clone())
            self._store.error[self._shard.cut(empty)] = 0
        return torch.where(empty, source / self._damping(), result)

    def _solve_newest(self) -> Tensor | None:
        """Returns the solution for the newest gradient in the window: ``s G^T (K + s damping I)^-1 e``."""
        solved = self._solved(self._ring.unit())
        return None if solved is None else self._combine(self._divisor * solved)

    def _solve_outside(self, vector: Tensor) -> Tensor | None:
        """Returns the solution for any vector: ``(x - G^T (K + s damping I)^-1 G x) / damping``."""
        solved = self._solved(self._products(vector))
        return None if solved is None else (vector - self._combine(solved)) / self._damping()

    def _solved(self, right_side: Tensor) -> Tensor | None:
        shift = self._divisor * self._damping()
        with self._stopwatch.phase("factorise"):
            if self._factor is not None and self._is_steady:
                solved = self._factor.solve(shift, right_side)
                if solved is not None:
                    self._jittered = 0
                    return solved
            found = solve_shifted(self._ring.gram, shift, right_side)
        if found is None:
            return None
        self._jittered = int(found[1] > 0)
        return found[0]

    @property
    def _is_steady(self) -> bool:
        """Whether the shift is that of the step before; else a kept factor would be made anew each time."""
        is_full = self._ring.count == self._ring.capacity
        return not callable(self._damping_schedule) and (is_full or self._scale_rule == "window")

    def _held(self) -> dict[str, int]:
        held = super()._held()
        return held if self._factor is None else held | {"factor": self._factor.memory_bytes()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `state_dict`.

        Raises:
            ValueError: it belongs to another method, window or model.
        """
        super().load_state_dict(state)
        if self._factor is not None:
            self._factor.reset()

    def _checked(self, newest: Tensor) -> tuple[float, float] | None:
        # The dense matrix of d x d is applied, gradient by gradient.
        result = self._solve_newest()
        if result is None:
            return None
        u, x, damping = result.double(), newest.double(), self._damping()
        applied = damping * u
        for slot in range(self._ring.count):
            row = self._row(slot).double()
            applied += row * (torch.dot(row, u) / self._divisor)
        size = float(x.norm())
        return float((applied - x).norm()) / size, float((damping * u - x).norm()) / size
