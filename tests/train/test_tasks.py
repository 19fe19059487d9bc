from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcsngd.train import losses, volume_dice
from hpcsngd.train.tasks import Classification, Segmentation

CPU = torch.device("cpu")


def logits(masks: Tensor) -> Tensor:
    """Returns what a sure and right model says."""
    return 20 * (2 * masks.float() - 1)


class TestCrossEntropy:
    def test_it_sums_over_samples(self) -> None:
        outputs, labels = torch.randn(5, 4, dtype=torch.float32), torch.tensor([0, 3, 1, 1, 2])
        expected = -outputs.log_softmax(dim=1)[torch.arange(5), labels].sum()
        assert torch.allclose(losses.cross_entropy(outputs, labels), expected)

    def test_hylos_smoothing_is_torchs_with_another_number(self) -> None:
        """eps / (K - 1) on each of the others, as the published code spreads it."""
        outputs, labels, classes, eps = torch.randn(3, 10).double(), torch.tensor([9, 0, 4]), 10, 0.1
        target = torch.full((3, classes), eps / (classes - 1), dtype=torch.float64)
        target[torch.arange(3), labels] = 1 - eps
        expected = -(target * outputs.log_softmax(dim=1)).sum()
        ours = losses.cross_entropy(outputs, labels, eps * classes / (classes - 1))
        assert torch.allclose(ours.double(), expected, rtol=1e-6)


class TestDice:
    def test_it_is_the_formula_of_the_whole_batch(self) -> None:
        torch.manual_seed(0)
        outputs, masks = torch.randn(3, 1, 4, 4), (torch.rand(3, 1, 4, 4) > 0.6).float()
        p = outputs.sigmoid()
        expected = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
        assert torch.allclose(losses.dice(outputs, masks), 3 * expected)

    def test_a_right_prediction_costs_nothing_even_of_nothing(self) -> None:
        masks = torch.zeros(2, 1, 4, 4)
        assert losses.dice(logits(masks), masks).item() == pytest.approx(0, abs=1e-5)
        masks[0, 0, 1:3] = 1
        assert losses.dice(logits(masks), masks).item() == pytest.approx(0, abs=1e-5)

    def test_its_gradient_is_that_of_the_formula(self) -> None:
        outputs = torch.randn(2, 1, 3, 3, dtype=torch.float32, requires_grad=True)
        masks = (torch.rand(2, 1, 3, 3) > 0.5).float()
        losses.dice(outputs, masks, smooth=0.5).backward()
        assert outputs.grad is not None
        p = outputs.detach().sigmoid().double()
        both, everything = (p * masks).sum() * 2 + 0.5, p.sum() + masks.sum() + 0.5
        by_p = -(2 * masks * everything - both) / everything**2
        assert torch.allclose(outputs.grad.double(), 2 * by_p * p * (1 - p), atol=1e-6)


class TestVolumes:
    def test_the_largest_component_counts(self) -> None:
        predicted = np.zeros((3, 6, 6), dtype=bool)
        predicted[0, 0, :3] = True
        predicted[1, 0, :3] = True  # touches the slice before: six voxels
        predicted[2, 4:, 4:] = True  # four voxels, elsewhere
        kept = volume_dice.largest_component(predicted)
        assert kept.sum() == 6
        assert not kept[2].any()
        true = np.zeros_like(predicted)
        true[0, 0, :4] = True
        # 3 of 6 and 4
        assert volume_dice.dice(predicted, true) == 2 * 3 / (6 + 4)

    def test_corners_do_not_join(self) -> None:
        predicted = np.zeros((1, 4, 4), dtype=bool)
        predicted[0, 0, 0] = predicted[0, 1, 1] = predicted[0, 1, 2] = True
        assert volume_dice.largest_component(predicted).sum() == 2

    def test_empty_volumes(self) -> None:
        nothing, something = np.zeros((2, 3, 3), dtype=bool), np.ones((2, 3, 3), dtype=bool)
        assert volume_dice.dice(nothing, nothing) == 1
        assert volume_dice.dice(nothing, something) == 0
        assert volume_dice.dice(something, nothing) == 0
        assert volume_dice.dice(something, something) == 1


def masks_of_two_patients() -> Tensor:
    masks = torch.zeros(5, 1, 6, 6)
    masks[0:3, 0, 1:4, 1:4] = 1  # the first patient's three slices
    masks[4, 0, 2:4, 2:4] = 1  # the second's two, one of them empty
    return masks


class TestSegmentation:
    task = Segmentation(1.0, {"a": 3, "b": 2})

    def test_a_right_prediction_has_dice_1_for_each_patient(self) -> None:
        masks = masks_of_two_patients()
        evaluation = self.task.evaluation(CPU)
        evaluation.add([0, 1, 2, 3, 4], logits(masks), masks)
        result = evaluation.result()
        assert result.patients == {"a": (3, 1.0), "b": (2, 1.0)}
        assert (result.sums.accuracy, result.sums.count) == (1.0, 5)
        assert result.sums.mean_loss == pytest.approx(0, abs=1e-5)

    def test_patients_count_alike_whatever_their_slices(self) -> None:
        masks = masks_of_two_patients()
        predicted = masks.clone()
        predicted[4] = 0  # all of the second patient's tumor is missed
        evaluation = self.task.evaluation(CPU)
        evaluation.add([0, 1, 2, 3, 4], logits(predicted), masks)
        result = evaluation.result()
        assert result.patients["b"] == (2, 0.0)
        assert result.sums.accuracy == 0.5

    def test_batches_change_nothing(self) -> None:
        torch.manual_seed(0)
        masks, outputs = masks_of_two_patients(), torch.randn(5, 1, 6, 6)
        results = []
        for parts in ([[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]]):
            evaluation = self.task.evaluation(CPU)
            for part in parts:
                evaluation.add(part, outputs[part], masks[part])
            results.append(evaluation.result())
        assert results[0].patients == results[1].patients
        # probabilities are float32
        assert results[0].sums.loss == pytest.approx(results[1].sums.loss, rel=1e-6)

    def test_the_score_in_training_is_the_batchs(self) -> None:
        masks = masks_of_two_patients()
        predicted = masks.clone()
        predicted[0] = 0
        # 31 marked, 22 found
        assert self.task.score(logits(predicted), masks).item() == pytest.approx(5 * 2 * 22 / (22 + 31))
        nothing = torch.zeros(2, 1, 4, 4)
        assert self.task.score(logits(nothing), nothing).item() == 2


class TestClassification:
    def test_smoothing_counts_in_training_only(self) -> None:
        outputs, labels = torch.tensor([[4.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        task = Classification(2, 0.2)
        plain = nn.functional.cross_entropy(outputs, labels, reduction="sum")
        assert task.loss(outputs, labels) != plain
        evaluation = task.evaluation(CPU)
        for index in range(2):
            evaluation.add([index], outputs[index : index + 1], labels[index : index + 1])
        result = evaluation.result()
        assert result.sums.loss == pytest.approx(plain.item())
        assert (result.sums.correct, result.sums.count, result.patients) == (1, 2, {})
        assert result.confusion is not None
        assert result.confusion.tolist() == [[1, 1], [0, 0]]
