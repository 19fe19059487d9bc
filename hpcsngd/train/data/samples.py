"""What every data set offers to the loop, and the one for images that lie in memory.

A data set is indexed by a list of samples, so that one call makes one micro-batch. Indexed by a plain list it
gives the samples as they are; indexed by `Wanted` it may change them at random. Those changes follow from
the seed, the epoch and each sample's index alone: they differ between epochs and samples, so between ranks as
well, and are the same after a resume, on another number of ranks, and in any loader process. Loading draws
from no random stream.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from hpcsngd.config.experiment import Augment
from hpcsngd.train.data import augment
from hpcsngd.train.data.draws import Draws

#: The model's inputs, one or more, and the targets, which come last; samples are the first dimension of all.
Batch: TypeAlias = tuple[Tensor, ...]

#: Limits take the first samples of this fixed shuffle, the same for every run.
_SHUFFLE_SEED = 0


class Wanted(NamedTuple):
    """The samples of a training batch, and the epoch (from 0) that decides how they are changed."""

    indices: list[int]
    epoch: int


class Samples(Dataset[Batch], ABC):
    """A set of samples.

    Attributes:
        channels: of the images; text has none.
        size: height and width in pixels; the largest, where they grow; text has none.
        blocks: sizes of the parts, in order, of which only one should be in memory; one part for most.
        groups: name -> number of samples, in order, where samples belong together (slices of a patient).
    """

    channels: int
    size: int

    def __init__(self) -> None:
        self._augment, self._seed = Augment(), 0

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of samples."""

    @abstractmethod
    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns the model's inputs and the targets; changed at random if there are draws.

        Images are one input, float32 ``(n, channels, size, size)``.
        """

    @abstractmethod
    def subset(self, chosen: Tensor) -> Self:
        """Returns the samples with these indices; in their order, unless `blocks` or `groups` need another.

        Args:
            chosen: ``(count,)``, int64.
        """

    @property
    def labels(self) -> Tensor:
        """Returns the labels, ``(samples,)``, int64.

        Raises:
            TypeError: the samples have no classes.
        """
        raise TypeError(f"{type(self).__name__} have no classes")

    @property
    def blocks(self) -> list[int]:
        """Returns the size of the one part."""
        return [len(self)]

    @property
    def groups(self) -> dict[str, int]:
        """Returns nothing: the samples are on their own."""
        return {}

    @property
    def targets(self) -> list[int] | None:
        """Returns how many targets (tokens) each sample has; None where each has one."""
        return None

    @property
    def streams(self) -> int:
        """Returns how many samples lie side by side at each moment of time; 0: samples have no order.

        Sample ``t * streams + s`` follows sample ``(t - 1) * streams + s``.
        """
        return 0

    def laid_out(self, streams: int) -> Self:
        """Returns the samples as that many streams, which only long texts are; any others are as before."""
        return self

    def example(self, count: int) -> tuple[Tensor, ...]:
        """Returns inputs of a trial pass through the model: blank images of the largest size."""
        return (torch.zeros(count, self.channels, self.size, self.size),)

    def __getitem__(self, wanted: Wanted | list[int]) -> Batch:
        if isinstance(wanted, Wanted):
            return self.take(wanted.indices, Draws(self._seed, wanted.epoch, wanted.indices))
        return self.take(wanted, None)

    def augmented(self, changes: Augment, seed: int) -> Self:
        """Returns the same samples, changed at random where they are asked for by `Wanted`."""
        return self._changed(_augment=changes, _seed=seed)

    def limited(self, count: int | None) -> Self:
        """Returns the first ``count`` samples of a fixed shuffle; all of them, in order, for None."""
        if count is None:
            return self
        return self.subset(
            torch.randperm(len(self), generator=torch.Generator().manual_seed(_SHUFFLE_SEED))[:count]
        )

    def _changed(self, **attributes: object) -> Self:
        """Returns the same samples with other values of some attributes."""
        result = copy.copy(self)
        vars(result).update(attributes)
        return result


class Images(Samples):
    """Images in memory; indexing by a list of samples gives ``(n, channels, size, size)`` float32 and labels.

    Args:
        pixels: ``(samples, channels, size, size)``, uint8 to save memory.
        labels: ``(samples,)``, int64.
        scale: largest pixel value; pixels are divided by it.
        mean: subtracted after that; one number, or one for each channel.
        std: divided by after that.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        *,
        scale: float,
        mean: float | Sequence[float],
        std: float | Sequence[float],
    ) -> None:
        super().__init__()
        self._pixels, self._labels, self._scale = pixels, labels, scale
        self._mean, self._std = (torch.tensor(value).reshape(-1, 1, 1) for value in (mean, std))
        self.channels, self.size = pixels.shape[1], pixels.shape[-1]

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, indices: list[int], draws: Draws | None) -> Batch:
        """Returns standardized images, cropped and turned before that, cut out after it; and labels."""
        pixels = self._pixels[indices]
        if draws is not None:
            pixels = augment.move(pixels, self._augment, draws)
        images = (pixels.to(torch.float32) / self._scale - self._mean) / self._std
        if draws is not None:
            images = augment.cutout(images, self._augment.cutout, draws)
        return images, self._labels[indices]

    def subset(self, chosen: Tensor) -> Self:
        """Returns the samples with these indices, in their order."""
        return self._changed(_pixels=self._pixels[chosen], _labels=self._labels[chosen])

    @property
    def labels(self) -> Tensor:
        """Returns the labels, ``(samples,)``, int64."""
        return self._labels


@dataclass(frozen=True)
class Splits:
    """A data set.

    Attributes:
        train: what is trained on.
        test: what is evaluated.
        num_classes: number of classes; 1 for masks.
        evaluated: what ``test`` is: the ``test`` set, or a ``validation`` set.
        extra: name -> another set that is evaluated as well, under its own name in eval.csv.
    """

    train: Samples
    test: Samples
    num_classes: int
    evaluated: Literal["test", "validation"] = "test"
    extra: Mapping[str, Samples] = field(default_factory=dict)
