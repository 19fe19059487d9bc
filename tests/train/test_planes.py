"""Planes in weight space, on weights few enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hpcsngd.train.planes import Plane, filter_normalised, through


def test_principal_components_of_snapshots_that_lie_in_a_plane() -> None:
    # along e1: -2, 0, 2; along e3: 1, -2, 1; mean (0, 5, 0, 0)
    snapshots = [torch.tensor(row) for row in ([-2.0, 5, 1, 0], [0.0, 5, -2, 0], [2.0, 5, 1, 0])]
    plane = through(snapshots)
    torch.testing.assert_close(plane.origin, torch.tensor([0.0, 5, 0, 0]))
    torch.testing.assert_close(plane.first, torch.tensor([1.0, 0, 0, 0]))  # towards the last snapshot
    torch.testing.assert_close(plane.second.abs(), torch.tensor([0.0, 0, 1, 0]))
    # squares 8 along the first axis, 6 along the second
    assert (plane.share_first, plane.share_second) == pytest.approx((8 / 14, 6 / 14))
    for weights in snapshots:
        a, b, distance = plane.place(weights)
        assert distance == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(plane.at(a, b), weights)


def test_the_distance_is_what_the_plane_leaves_out() -> None:
    plane = Plane(torch.zeros(3), torch.tensor([2.0, 0, 0]), torch.tensor([1.0, 1, 0]))
    a, b, distance = plane.place(torch.tensor([4.0, 2, 7]))  # 1 first + 2 second, and 7 above
    assert (a, b, distance) == pytest.approx((1, 2, 7))


def test_too_few_snapshots_and_a_line_are_refused() -> None:
    with pytest.raises(ValueError, match="at least three checkpoints, there are 2"):
        through([torch.zeros(3), torch.ones(3)])
    with pytest.raises(ValueError, match="on one line"):
        through([place * torch.ones(3) for place in (0.0, 1.0, 3.0)])
    with pytest.raises(ValueError, match="on one line"):
        through([torch.ones(3)] * 4)


def test_random_directions_have_the_length_of_each_filter_and_leave_biases_alone() -> None:
    weight, bias = torch.arange(1.0, 25).reshape(2, 3, 2, 2), torch.ones(5)
    plane = filter_normalised([weight, bias], torch.Generator().manual_seed(0))
    for direction in (plane.first, plane.second):
        filters = direction[:24].reshape(2, -1)
        torch.testing.assert_close(filters.norm(dim=1), weight.flatten(1).norm(dim=1))
        assert (direction[24:] == 0).all()
    assert not torch.equal(plane.first, plane.second)
    torch.testing.assert_close(plane.at(0, 0), torch.cat([weight.flatten(), bias]))
    assert math.isnan(plane.share_first)


def test_a_filter_of_zeros_stays_where_it_is() -> None:
    plane = filter_normalised([torch.zeros(2, 3)], torch.Generator().manual_seed(0))
    assert (plane.first == 0).all()
