"""The data sets, by the names that experiments use, and the loaders that feed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from hpcsngd.config import experiment as schema
from hpcsngd.errors import did_you_mean
from hpcsngd.train import seeds
from hpcsngd.train.data.cifar import cifar10, cifar100
from hpcsngd.train.data.digits import digits
from hpcsngd.train.data.features import features
from hpcsngd.train.data.idx import fashion_mnist, mnist
from hpcsngd.train.data.imagenet import imagenet
from hpcsngd.train.data.mri import lgg_mri
from hpcsngd.train.data.samples import Batch, Images, Samples, Splits, Wanted
from hpcsngd.train.data.small_imagenet import imagenet32, imagenet64
from hpcsngd.train.data.staging import stage
from hpcsngd.train.faults import SettingError
from hpcsngd.train.sampler import ShardedSampler

__all__ = [
    "DATASETS",
    "Batch",
    "EpochSampler",
    "Images",
    "Samples",
    "Splits",
    "Wanted",
    "fold",
    "load",
    "loader",
]


def _multi30k(root: Path | None, config: schema.Data) -> Splits:
    # not above: texts are samples, whose module is in this package
    from hpcsngd.train.text.pairs import multi30k

    return multi30k(root, config)


def _token_files(root: Path | None, config: schema.Data) -> Splits:
    from hpcsngd.train.text.stream import token_files

    return token_files(root, config)


def _glue(root: Path | None, config: schema.Data) -> Splits:
    from hpcsngd.train.text.datasets import load_glue

    return load_glue(root, config)


def _squad(root: Path | None, config: schema.Data) -> Splits:
    from hpcsngd.train.text.datasets import load_squad

    return load_squad(root, config)


DATASETS: dict[str, Callable[[Path | None, schema.Data], Splits]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "imagenet32": imagenet32,
    "imagenet64": imagenet64,
    "lgg-mri": lgg_mri,
    "features": features,
    "multi30k": _multi30k,
    "ptb": _token_files,
    "wikitext2": _token_files,
    "wikitext103": _token_files,
    **dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"), _glue),
    **dict.fromkeys(("squad", "squadv2"), _squad),
}


def load(config: schema.Data, data_root: str | None, *, seed: int = 0) -> Splits:
    """Returns an experiment's data set, limited as it says; with folds, evaluates a part of the training set.

    Args:
        config: the experiment's ``data``.
        data_root: the site's folder of data sets; ``config.root`` wins over it.
        seed: of the run; decides how training images are changed.

    Raises:
        MissingDataError: the files are not there or damaged.
        SettingError: an unknown name, or folds or classes that the data cannot be cut into.
    """
    if config.name not in DATASETS:
        hint = did_you_mean(config.name, DATASETS)
        raise SettingError(f"unknown data set {config.name!r}{hint} known: {', '.join(DATASETS)}")
    given = config.root or data_root
    root = Path(given).expanduser() if given else None
    if config.stage is not None:
        root = stage(config.stage, config.name, root)
    splits = _with_classes(DATASETS[config.name](root, config), config.classes)
    train, test = splits.train.limited(config.train_limit), splits.test.limited(config.test_limit)
    if config.folds is None:
        extra = {name: part.limited(config.test_limit) for name, part in splits.extra.items()}
        return Splits(
            train.augmented(config.augment, seed), test, splits.num_classes, splits.evaluated, extra
        )
    kept, held_out = fold(train.labels, config.folds)
    changed = train.subset(kept).augmented(config.augment, seed)
    return Splits(changed, train.subset(held_out), splits.num_classes, "validation")


def _with_classes(splits: Splits, classes: int | None) -> Splits:
    """Returns the samples of the first classes, images and labels together."""
    if classes is None:
        return splits
    if classes > splits.num_classes:
        raise SettingError(f"data.classes is {classes}, but there are only {splits.num_classes}")
    train, test = (
        part.subset((part.labels < classes).nonzero().flatten()) for part in (splits.train, splits.test)
    )
    if not len(train) or not len(test):
        raise SettingError(f"no samples of the first {classes} classes")
    return Splits(train, test, classes, splits.evaluated)


def fold(labels: Tensor, config: schema.Folds) -> tuple[Tensor, Tensor]:
    """Returns the indices of the samples that are kept for training and of those that are held out.

    The folds are scikit-learn's `KFold` and `StratifiedKFold`. They follow from the labels and the settings
    alone, so runs that differ in ``index`` hold out every sample once between them.

    Args:
        labels: of the training set, ``(samples,)``.
        config: number of folds, which one is held out, and how they are drawn.

    Raises:
        SettingError: fewer samples, or fewer of some class, than folds.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    counts = labels.bincount()
    least = int(counts[counts > 0].min()) if config.stratified else len(labels)
    if least < config.count:
        what = "the rarest class has" if config.stratified else "there are"
        raise SettingError(f"{config.count} folds need as many samples, but {what} only {least}")
    make = StratifiedKFold if config.stratified else KFold
    folds = make(config.count, shuffle=config.shuffled, random_state=config.seed if config.shuffled else None)
    kept, held_out = list(folds.split(np.zeros(len(labels)), labels.numpy()))[config.index]
    return torch.from_numpy(kept), torch.from_numpy(held_out)


class EpochSampler(Sampler[Wanted]):
    """Yields a training sampler's batches with their epoch, by which samples are changed at random.

    Args:
        sampler: of the training set; says which epoch it is in.
    """

    def __init__(self, sampler: ShardedSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[Wanted]:
        epoch = self._sampler.epoch
        for indices in self._sampler:
            yield Wanted(indices, epoch)


def loader(
    samples: Samples, sampler: Sampler[Wanted] | Sampler[list[int]], *, workers: int, pin: bool
) -> DataLoader[Batch]:
    """Returns a loader of the sampler's batches.

    Args:
        samples: the data.
        sampler: yields the samples of each batch.
        workers: loader processes; 0 loads in this one.
        pin: whether batches lie in pinned memory, for copies to a GPU.
    """
    return DataLoader(
        samples,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        # a fork would copy a process in which the threads of the communication library hold locks
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin,
        # DataLoader draws a seed for its workers in each epoch; not from the stream that training uses
        generator=seeds.generator(0, "loader"),
    )
