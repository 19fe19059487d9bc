"""What stands for the gradient of each sample's own loss in one layer, and products with it.

Notation, used by every formula of the sample-space methods: a layer with matrix ``M`` of shape
``(d_out, d_in)`` (bias as last column; `hpcsngd.optim.layers` says how a weight becomes a matrix) has ``n``
samples; the gradient of sample i's own loss is a matrix ``U_i`` of the same shape, ``u_i = vec(U_i)``, and

    F = 1/n sum_i u_i u_i^T                      never formed
    K = U U^T, K_ij = <U_i, U_j>                 n x n

`Rows` are the samples of one layer in one of two forms. With G groups of ``o = d_out / G`` rows each and
S terms per sample and group (one per position, or a single one where positions were reduced):

    FactoredRows     U_i = sum_s g_is a_is^T in each group
        gram n^2 G S^2 (d_in + o), project and combine n G S d_in o multiplications; n G S (d_in + o) numbers
    GradientRows     U_i itself
        gram n^2 G d_in o, project and combine n G d_in o multiplications; n G d_in o numbers

The gram decides which is cheaper: factors where ``S^2 (d_in + o) <= d_in o``. What it costs to make matrices
(n G S d_in o) is left out, because n differs between ranks and the form must not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def factors_are_cheaper(terms: int, d_in: int, d_out: int) -> bool:
    """Returns whether ``terms`` outer products per sample need less work than the sum of them.

    Args:
        terms: per sample and group.
        d_in: columns of the layer's matrix.
        d_out: rows of the layer's matrix in one group.
    """
    return terms**2 * (d_in + d_out) <= d_in * d_out


class Rows(ABC):
    """The samples of one layer; ``len()`` is their number. Tensors are never changed in place."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what the rows consist of; the first dimension of each counts the samples."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """Returns the outer products per sample and group; 0 if they are summed up into matrices."""

    @abstractmethod
    def with_terms(self, terms: int) -> Rows:
        """Returns the same samples with so many terms (0: as matrices), at least as many as there are."""

    @abstractmethod
    def replaced(self, tensors: Sequence[Tensor]) -> Rows:
        """Returns rows of the same form that consist of other ``tensors``."""

    @abstractmethod
    def scaled(self, factors: float | Tensor) -> Rows:
        """Returns ``factors_i * U_i``, for one number or a tensor of shape ``(n,)``."""

    @abstractmethod
    def products(self, others: Rows) -> Tensor:
        """Returns ``<U_i, V_j>``, shape ``(n, len(others))``, for ``others`` of the same form and layer."""

    def gram(self) -> Tensor:
        """Returns ``K``, shape ``(n, n)``: the inner products of the samples' gradients."""
        return self.products(self)

    @abstractmethod
    def scores(self) -> Tensor:
        """Returns the diagonal of ``K``, shape ``(n,)``, float64: squared norms of the samples' gradients."""

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """Returns ``<U_i, M>``, shape ``(n,)``: ``U vec(M)`` for a ``matrix`` of shape ``(d_out, d_in)``."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Returns ``sum_i weights_i U_i``, shape ``(d_out, d_in)``, for ``weights`` of shape ``(n,)``."""

    @property
    @abstractmethod
    def entries(self) -> int:
        """Returns ``d_out * d_in``: no kernel has more nonzero eigenvalues."""

    @abstractmethod
    def matrices(self) -> Tensor:
        """Returns every ``U_i``, shape ``(n, d_out, d_in)``."""

    def __len__(self) -> int:
        return len(self.tensors[0])

    def take(self, index: Tensor) -> Rows:
        """Returns the samples at ``index``, int64 of shape ``(kept,)`` on any device."""
        on_device = index.to(self.tensors[0].device)
        return self.replaced([tensor[on_device] for tensor in self.tensors])

    def to(self, like: Tensor) -> Rows:
        """Returns the rows on the device and in the dtype of ``like``."""
        return self.replaced([tensor.to(like) for tensor in self.tensors])

    def double(self) -> Rows:
        """Returns the rows in float64."""
        return self.replaced([tensor.double() for tensor in self.tensors])

    def is_finite(self) -> Tensor:
        """Returns whether every number is finite, a boolean scalar on the rows' device."""
        if len(self) == 0:
            return torch.ones((), dtype=torch.bool, device=self.tensors[0].device)
        # Extremes carry NaN and infinity along, and are found 20 times faster than isfinite() on every entry.
        extremes = [extreme for tensor in self.tensors for extreme in tensor.aminmax()]
        return torch.stack(extremes).isfinite().all()

    @property
    def numbers(self) -> int:
        """Returns how many numbers one sample consists of."""
        return sum(tensor.shape[1:].numel() for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Returns the bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class FactoredRows(Rows):
    """``U_i = sum_s g_is a_is^T`` in each group of the layer's outputs.

    Attributes:
        a: inputs, shape ``(n, groups, terms, d_in)``.
        g: output gradients, shape ``(n, groups, terms, d_out / groups)``.
    """

    a: Tensor
    g: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Rows.tensors`."""
        return self.a, self.g

    @property
    def terms(self) -> int:
        """See `Rows.terms`."""
        return self.a.shape[2]

    def with_terms(self, terms: int) -> Rows:
        """See `Rows.with_terms`."""
        if terms == 0:
            return GradientRows(self.matrices())
        missing = terms - self.terms
        # A term with a zero gradient adds nothing.
        return self if missing == 0 else self.replaced([pad(t, (0, 0, 0, missing)) for t in self.tensors])

    def replaced(self, tensors: Sequence[Tensor]) -> FactoredRows:
        """See `Rows.replaced`."""
        a, g = tensors
        return FactoredRows(a, g)

    def scaled(self, factors: float | Tensor) -> FactoredRows:
        """See `Rows.scaled`."""
        return FactoredRows(self.a, self.g * _by_sample(factors, 4))

    def products(self, others: Rows) -> Tensor:
        """See `Rows.products`."""
        a, g = others.tensors
        if self.a.shape[1] == self.terms == others.terms == 1:
            return (self.a.flatten(1) @ a.flatten(1).T).mul_(self.g.flatten(1) @ g.flatten(1).T)
        found = self.a.new_zeros(len(self), len(others))
        # One group at a time: what is in memory is (n terms)^2, not that times the groups.
        for group in range(self.a.shape[1]):
            of_inputs, of_gradients = (
                mine[:, group].flatten(0, 1) @ theirs[:, group].flatten(0, 1).T
                for mine, theirs in ((self.a, a), (self.g, g))
            )
            products = of_inputs.mul_(of_gradients)
            found += products.reshape(len(self), self.terms, len(others), others.terms).sum((1, 3))
        return found

    def scores(self) -> Tensor:
        """See `Rows.scores`."""
        if self.terms == 1:
            norms = [torch.linalg.vector_norm(t, dim=3, dtype=torch.float64) for t in self.tensors]
            squares: Tensor = (norms[0] * norms[1]).square()
            return squares.sum((1, 2))
        a, g = self.a.double(), self.g.double()
        return ((a @ a.mT) * (g @ g.mT)).sum((1, 2, 3))

    def project(self, matrix: Tensor) -> Tensor:
        """See `Rows.project`."""
        a, g = self._by_group(self.a), self._by_group(self.g)
        of_terms = ((g @ self._blocks(matrix)) * a).sum((0, 2))
        return of_terms.reshape(len(self), self.terms).sum(1)

    def combine(self, weights: Tensor) -> Tensor:
        """See `Rows.combine`."""
        return (self._by_group(self.g * _by_sample(weights, 4)).mT @ self._by_group(self.a)).flatten(0, 1)

    @property
    def entries(self) -> int:
        """See `Rows.entries`."""
        return self.a.shape[3] * self.g.shape[3] * self.g.shape[1]

    def matrices(self) -> Tensor:
        """See `Rows.matrices`."""
        return (self.g.mT @ self.a).flatten(1, 2)

    def _by_group(self, tensor: Tensor) -> Tensor:
        """Returns ``(groups, n * terms, d)`` of ``(n, groups, terms, d)``."""
        return tensor.transpose(0, 1).flatten(1, 2)

    def _blocks(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.a.shape[1], -1, matrix.shape[1])


@dataclass(frozen=True, eq=False)
class GradientRows(Rows):
    """The matrices ``U_i`` themselves.

    Attributes:
        u: shape ``(n, d_out, d_in)``.
    """

    u: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Rows.tensors`."""
        return (self.u,)

    @property
    def terms(self) -> int:
        """See `Rows.terms`."""
        return 0

    def with_terms(self, terms: int) -> Rows:
        """See `Rows.with_terms`."""
        if terms:
            raise ValueError(f"terms={terms}: matrices cannot be taken apart into terms")
        return self

    def replaced(self, tensors: Sequence[Tensor]) -> GradientRows:
        """See `Rows.replaced`."""
        (u,) = tensors
        return GradientRows(u)

    def scaled(self, factors: float | Tensor) -> GradientRows:
        """See `Rows.scaled`."""
        return GradientRows(self.u * _by_sample(factors, 3))

    def products(self, others: Rows) -> Tensor:
        """See `Rows.products`."""
        return self.u.flatten(1) @ others.tensors[0].flatten(1).T

    def scores(self) -> Tensor:
        """See `Rows.scores`."""
        norms: Tensor = torch.linalg.vector_norm(self.u, dim=(1, 2), dtype=torch.float64)
        return norms.square()

    def project(self, matrix: Tensor) -> Tensor:
        """See `Rows.project`."""
        return self.u.flatten(1) @ matrix.flatten()

    def combine(self, weights: Tensor) -> Tensor:
        """See `Rows.combine`."""
        return (weights @ self.u.flatten(1)).reshape(self.u.shape[1:])

    @property
    def entries(self) -> int:
        """See `Rows.entries`."""
        return self.u.shape[1:].numel()

    def matrices(self) -> Tensor:
        """See `Rows.matrices`."""
        return self.u


def _by_sample(factors: float | Tensor, dims: int) -> float | Tensor:
    """Returns factors that broadcast over the further dimensions of a tensor of ``dims`` dimensions."""
    return factors.reshape(-1, *[1] * (dims - 1)) if isinstance(factors, Tensor) else factors


def common_terms(terms: Sequence[int]) -> int:
    """Returns the number of terms in which rows with these numbers of terms can all be written."""
    return 0 if 0 in terms else max(terms)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Returns the samples of all parts (at least one), in order."""
    terms = common_terms([part.terms for part in parts])
    alike = [part.with_terms(terms) for part in parts]
    if len(alike) == 1:
        return alike[0]
    columns = zip(*(part.tensors for part in alike), strict=True)
    return alike[0].replaced([torch.cat(column) for column in columns])


def rows_from(tensors: Sequence[Tensor], sizes: tuple[int, int], groups: int) -> Rows:
    """Returns rows that consist of saved ``tensors``.

    Args:
        tensors: of `Rows.tensors`.
        sizes: ``(d_in, d_out)`` of the layer's matrix.
        groups: of the layer.

    Raises:
        ValueError: the shapes are not those of rows of such a layer.
    """
    d_in, d_out = sizes
    shapes = [tuple(tensor.shape) for tensor in tensors]
    n = shapes[0][0] if shapes and shapes[0] else 0
    if shapes == [(n, d_out, d_in)]:
        return GradientRows(tensors[0])
    terms = shapes[0][2] if shapes and len(shapes[0]) == 4 else 1
    wanted = [(n, groups, terms, d_in), (n, groups, terms, d_out // groups)]
    if shapes != wanted:
        raise ValueError(f"rows have shapes {shapes}, the layer wants {wanted} or {[(n, d_out, d_in)]}")
    return FactoredRows(*tensors)
