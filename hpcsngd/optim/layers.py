"""What the inputs and output gradients of each covered layer type mean, as one matrix at many positions.

Shape contract, the same for every layer type. A layer call maps an input to an output; both carry one sample
per entry of their first dimension and may carry *positions* (tokens, pixels) in further ones. The weight is a
matrix ``(d_out, d_in)`` that is applied at each position s of sample i to an input vector ``x_is``:

    Linear           x_is = the features at a position; positions = every dimension between first and last
    Conv             x_is = the patch under the kernel, (channel, taps) flattened; positions = output pixels
    ConvTranspose    x_is = for each (channel, tap) the input pixel that the tap carries to this output pixel,
                     zero if there is none; positions = output pixels

The matrix of a ConvTranspose is its weight with input and output channels exchanged. With groups, rows of the
matrix belong to consecutive groups of output channels, and each group has its own ``x_is``, made of its own
input channels. The layer's curvature stays one matrix over *all* its parameters: groups are correlated
through the samples, so F is not block-diagonal even for a depthwise convolution.

With ``g_is`` the gradient at the output, the gradient of the sample's own loss is ``sum_s g_is x_is^T`` in
each group. `Layer` reduces positions without building patches, or makes that product exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from hpcsngd.optim.boxsums import box_sums
from hpcsngd.optim.moments import gram, patch_moment
from hpcsngd.optim.positions import Geometry, carried, patches
from hpcsngd.optim.rows import FactoredRows, GradientRows, Rows, factors_are_cheaper

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CoveredModule = nn.Linear | Convolution | TransposedConvolution

#: Patches are built for as many samples at a time as fit into this, at least one.
PATCH_BYTES = 2**23


@dataclass(frozen=True)
class Layer:
    """A covered layer.

    Attributes:
        name: of the module inside the model.
        module: the layer itself.
        has_bias: whether a trainable bias is the last column of the layer's matrix.
    """

    name: str
    module: CoveredModule
    has_bias: bool

    @property
    def parameters(self) -> list[Tensor]:
        """Returns the weight and, if it is covered, the bias."""
        bias = self.module.bias
        return [self.module.weight] if bias is None or not self.has_bias else [self.module.weight, bias]

    @property
    def groups(self) -> int:
        """Returns into how many groups the layer's outputs fall."""
        return 1 if isinstance(self.module, nn.Linear) else self.module.groups

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Returns ``(d_in, d_out)`` of the layer's matrix, the bias counted in ``d_in``."""
        weight = self.module.weight
        d_out = len(weight) if isinstance(self.module, nn.Linear) else self.module.out_channels
        return weight.numel() // d_out + int(self.has_bias), d_out

    def factors_are_cheaper(self, positions: int) -> bool:
        """Returns whether a sample's gradient is kept as one outer product for each of its positions."""
        d_in, d_out = self.row_sizes
        return factors_are_cheaper(positions, d_in, d_out // self.groups)

    def to_matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        """Returns tensors shaped like `parameters` as one matrix ``(d_out, d_in)``, perhaps a view."""
        weight, *bias = parameters
        is_transposed = isinstance(self.module, TransposedConvolution)
        matrix = self._weights_to_matrices(weight.unsqueeze(0))[0] if is_transposed else weight.flatten(1)
        return torch.cat([matrix, *(b.unsqueeze(1) for b in bias)], 1) if bias else matrix

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Returns a matrix ``(d_out, d_in)`` as tensors shaped like `parameters`."""
        shape = self.module.weight.shape
        columns = matrix.shape[1] - int(self.has_bias)
        weight = matrix[:, :columns] if self.has_bias else matrix
        if isinstance(self.module, TransposedConvolution):
            weight = weight.reshape(self.groups, shape[1], -1, shape[2:].numel()).transpose(1, 2)
        return [weight.reshape(shape), *([matrix[:, columns]] if self.has_bias else [])]

    def input_sums(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Returns the inputs summed over the positions and how many there are.

        Args:
            x: the call's input.
            output: the call's output (only its shape is read).
            dtype: of the result; sums are taken in it.

        Returns:
            ``(n, groups, d_in)`` without bias, always new memory (the caller may reuse its input buffer
            before the rows are read), and the number of positions.
        """
        x, output = self._batched(x), self._batched(output)
        if isinstance(self.module, nn.Linear):
            return x.sum(2, dtype=dtype).unsqueeze(1), x.shape[2]
        geometry, size = _geometry(self.module), output.shape[2:]
        if isinstance(self.module, TransposedConvolution):
            boxes = geometry.grid_boxes(image=size, grid=x.shape[2:])
        else:
            boxes = geometry.image_boxes(image=x.shape[2:], grid=size)
        return self._grouped(box_sums(x, boxes, dtype)), size.numel()

    def output_sums(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the output gradient summed over the positions, ``(n, groups, d_out / groups)``."""
        return self._grouped(self._batched(grad).flatten(2)).sum(3, dtype=dtype)

    def input_vectors(self, x: Tensor, output: Tensor) -> Tensor:
        """Returns every ``x_is`` without bias, ``(n, groups, d_in, positions)``; patches are built.

        Args:
            x: the call's input.
            output: the call's output (only its shape is read).
        """
        x, output = self._batched(x), self._batched(output)
        if not isinstance(self.module, TransposedConvolution):
            return self._patches(x, output.shape[2:])
        return self._grouped(carried(x, _geometry(self.module), output.shape[2:]))

    def input_moment(self, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns ``sum_is x_is x_is^T`` without bias, ``(groups, d_in, d_in)``.

        Args:
            x: the call's input.
            output: the call's output (only its shape is read).
            dtype: of the result, and of what is computed.
        """
        x, size = self._batched(x).to(dtype), self._batched(output).shape[2:]
        if isinstance(self.module, nn.Linear):
            return gram(x.unsqueeze(1))
        geometry = _geometry(self.module)
        if not isinstance(self.module, TransposedConvolution):
            return patch_moment(self._grouped(x), geometry, size)
        at_once = max(
            1, PATCH_BYTES // (x.shape[1] * prod(geometry.kernel) * size.numel() * x.element_size())
        )
        parts = [gram(self._grouped(carried(part, geometry, size))) for part in torch.split(x, at_once)]
        return torch.stack(parts).sum(0)

    def output_vectors(self, grad: Tensor) -> Tensor:
        """Returns every ``g_is``, ``(n, groups, d_out / groups, positions)``."""
        return self._grouped(self._batched(grad).flatten(2))

    def exact_rows(self, x: Tensor, grad: Tensor, dtype: torch.dtype) -> Rows:
        """Returns the true gradient of every sample, bias included, in the form that needs less work.

        The form depends on the layer and the number of positions only. Transposed convolutions are always
        kept as matrices. Patches are in memory for PATCH_BYTES at a time; the result is always new memory.

        Args:
            x: the call's input.
            grad: the gradient at the call's output.
            dtype: of the result, and of what is computed.
        """
        x, grad = self._batched(x), self._batched(grad)
        positions = grad.shape[2:].numel()
        if self.factors_are_cheaper(positions) and not isinstance(self.module, TransposedConvolution):
            return self._factored_rows(x, grad, dtype)
        d_in, d_out = self.row_sizes
        u = torch.empty(len(x), d_out, d_in, dtype=dtype, device=x.device)
        weight_columns = u[:, :, : d_in - int(self.has_bias)]
        at_once = self._samples_at_once(x, grad, dtype)
        for part in (slice(start, start + at_once) for start in range(0, len(x), at_once)):
            gradients = self._weight_gradients(x[part].to(dtype), grad[part].to(dtype))
            weight_columns[part] = self._weights_to_matrices(gradients)
        if self.has_bias:
            u[:, :, -1] = grad.flatten(2).sum(2, dtype=dtype)
        return GradientRows(u)

    def _factored_rows(self, x: Tensor, grad: Tensor, dtype: torch.dtype) -> FactoredRows:
        """Returns one term per position: the positions' inputs, a 1 where there is a bias, and gradients."""
        g = self._grouped(grad.flatten(2)).mT.to(dtype, copy=True)
        a = torch.ones(*g.shape[:3], self.row_sizes[0], dtype=dtype, device=x.device)
        inputs = self._patches(x, grad.shape[2:])
        a[..., : inputs.shape[2]] = inputs.mT
        return FactoredRows(a, g)

    def _weight_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        """Returns each sample's gradient of the weight, ``(n, *weight.shape)``.

        A transposed convolution is the same product with the roles of input and output exchanged.
        """
        swap = isinstance(self.module, TransposedConvolution)
        image, grid = (grad, x) if swap else (x, grad)
        product = self._grouped(grid.flatten(2)) @ self._patches(image, grid.shape[2:]).mT
        return product.reshape(len(x), *self.module.weight.shape)

    def _patches(self, image: Tensor, grid: torch.Size) -> Tensor:
        """Returns what is read at every position, ``(n, groups, d, positions)``."""
        if isinstance(self.module, nn.Linear):
            return image.unsqueeze(1)
        return self._grouped(patches(image, _geometry(self.module), grid))

    def _samples_at_once(self, x: Tensor, grad: Tensor, dtype: torch.dtype) -> int:
        if isinstance(self.module, nn.Linear):
            return len(x)
        swap = isinstance(self.module, TransposedConvolution)
        image, grid = (grad, x) if swap else (x, grad)
        taps = self.module.weight.shape[2:].numel()
        return max(1, PATCH_BYTES // (image.shape[1] * taps * grid.shape[2:].numel() * dtype.itemsize))

    def _grouped(self, x: Tensor) -> Tensor:
        """Returns ``(n, groups, channels / groups, ...)`` of ``(n, channels, ...)``."""
        return x.reshape(len(x), self.groups, x.shape[1] // self.groups, *x.shape[2:])

    def _weights_to_matrices(self, weights: Tensor) -> Tensor:
        """Returns ``(n, d_out, d_in without bias)`` of ``(n, *weight.shape)``."""
        if isinstance(self.module, TransposedConvolution):
            weights = self._grouped(weights).transpose(2, 3).flatten(1, 2)
        return weights.flatten(2)

    def _batched(self, x: Tensor) -> Tensor:
        """Returns ``(n, channels, ...)`` of an input or output, which may be a single sample.

        A Linear's features come last; they are its channels, and all its positions become one dimension.
        """
        if isinstance(self.module, nn.Linear):
            batch = x if x.dim() > 1 else x.unsqueeze(0)
            return batch.unsqueeze(1).flatten(1, -2).mT
        return x if x.dim() == self.module.weight.dim() else x.unsqueeze(0)


def _geometry(module: Convolution | TransposedConvolution) -> Geometry:
    """Returns the module's geometry; of the two sides of ``padding="same"`` the odd zero is behind."""
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    if isinstance(module.padding, str):
        totals = [
            d * (k - 1) if module.padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
        ]
        before = tuple(total // 2 for total in totals)
    else:
        before = tuple(module.padding)
    return Geometry(kernel, tuple(module.stride), dilation, before)
