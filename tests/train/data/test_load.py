from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsngd.config import experiment as schema
from hpcsngd.config.catalogue import DATASETS as CATALOGUE
from hpcsngd.train import data, tinydata
from hpcsngd.train.faults import SettingError
from hpcsngd.train.sampler import EvaluationSampler


def config(name: str = "digits", **fields: Any) -> schema.Data:
    return schema.Data.model_validate({"name": name, **fields})


def test_the_catalogue_and_the_loaders_have_the_same_names() -> None:
    assert data.DATASETS.keys() == CATALOGUE.keys() == tinydata.WRITERS.keys()


def test_digits_are_split_by_class_and_standardized() -> None:
    splits = data.load(config(), None)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (1438, 359, 10)
    images, labels = splits.train[list(range(1438))]
    assert images.shape == (1438, 1, 8, 8)
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3
    test_labels = splits.test[list(range(359))][1]
    for label in range(10):
        share = (test_labels == label).sum() / ((test_labels == label).sum() + (labels == label).sum())
        assert abs(share.item() - 0.2) < 0.005


def test_digits_train_and_test_share_no_image() -> None:
    splits = data.load(config(), None)
    train, test = (part[list(range(len(part)))][0].flatten(1) for part in (splits.train, splits.test))
    # scikit-learn's set itself holds no image twice, so a shared one would be a mistake of the split
    assert torch.cdist(test, train).min() > 0


def test_limits_take_the_same_samples_in_every_run() -> None:
    once, again = (data.load(config(train_limit=30, test_limit=20), None) for _ in range(2))
    assert (len(once.train), len(once.test)) == (30, 20)
    assert torch.equal(once.train[list(range(30))][0], again.train[list(range(30))][0])
    assert len(once.train[list(range(30))][1].unique()) >= 8


def test_a_limit_above_the_size_takes_everything() -> None:
    assert len(data.load(config(test_limit=5000), None).test) == 359


def contents(images: data.Images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images[list(range(len(images)))][0]}


class TestFolds:
    def held_out(self, **fields: Any) -> list[list[int]]:
        """Returns the held-out indices of every fold of the digits' training set."""
        labels = data.load(config(), None).train.labels
        count = fields.setdefault("count", 5)
        parts = [
            data.fold(labels, schema.Folds.model_validate({**fields, "index": index}))
            for index in range(count)
        ]
        for kept, held in parts:
            assert sorted([*kept.tolist(), *held.tolist()]) == list(range(1438))
        return [held.tolist() for _, held in parts]

    @pytest.mark.parametrize("stratified", [False, True])
    @pytest.mark.parametrize("shuffled", [False, True])
    def test_every_sample_is_held_out_once(self, shuffled: bool, stratified: bool) -> None:
        folds = self.held_out(shuffled=shuffled, stratified=stratified)
        assert sorted(index for fold in folds for index in fold) == list(range(1438))
        assert {len(fold) for fold in folds} == {287, 288}

    def test_stratified_folds_have_the_same_share_of_each_class(self) -> None:
        labels = data.load(config(), None).train.labels
        counts = torch.stack([labels[fold].bincount(minlength=10) for fold in self.held_out()])
        assert (counts.max(dim=0).values - counts.min(dim=0).values).max() <= 1
        plain = self.held_out(stratified=False)
        uneven = torch.stack([labels[fold].bincount(minlength=10) for fold in plain])
        assert (uneven.max(dim=0).values - uneven.min(dim=0).values).max() > 1

    def test_plain_folds_are_consecutive(self) -> None:
        folds = self.held_out(shuffled=False, stratified=False)
        assert [index for fold in folds for index in fold] == list(range(1438))

    def test_the_seed_alone_decides_the_shuffle(self) -> None:
        assert self.held_out(seed=3) == self.held_out(seed=3)
        assert self.held_out(seed=3) != self.held_out(seed=4)

    def test_the_test_set_stays_unseen(self) -> None:
        splits = data.load(config(folds={"count": 5, "index": 2}), None)
        assert (splits.evaluated, len(splits.train), len(splits.test)) == ("validation", 1150, 288)
        whole = data.load(config(), None)
        assert whole.evaluated == "test"
        kept, held, known = contents(splits.train), contents(splits.test), contents(whole.train)
        assert (len(kept), len(held)) == (1150, 288)
        assert kept | held == known
        assert not known & contents(whole.test)

    def test_folds_cut_what_the_limit_leaves(self) -> None:
        splits = data.load(config(train_limit=100, folds={"count": 4, "index": 0}), None)
        assert (len(splits.train), len(splits.test)) == (75, 25)

    @pytest.mark.parametrize(
        ("stratified", "words"), [(True, "the rarest class has only"), (False, "there are only 8")]
    )
    def test_too_many_folds_are_refused(self, stratified: bool, words: str) -> None:
        folds = {"count": 9, "index": 0, "stratified": stratified}
        with pytest.raises(SettingError, match=f"9 folds need as many samples, but {words}"):
            data.load(config(train_limit=8, folds=folds), None)

    def test_folds_count_from_zero(self) -> None:
        with pytest.raises(ValueError, match="folds are counted from 0 to 4"):
            config(folds={"count": 5, "index": 5})


@pytest.mark.slow
def test_loader_processes_give_the_same_batches_and_leave_the_streams_alone() -> None:
    images = data.load(config(train_limit=50), None).train
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for workers in (0, 2):
        before = torch.get_rng_state()
        batches.append(list(data.loader(images, EvaluationSampler(50, 8), workers=workers, pin=False)))
        assert torch.equal(torch.get_rng_state(), before)
    for alone, helped in zip(*batches, strict=True):
        assert torch.equal(alone[0], helped[0])
        assert torch.equal(alone[1], helped[1])
