from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcsngd.config.catalogue import MODELS as CATALOGUE
from hpcsngd.train.faults import SettingError
from hpcsngd.train.models import MODELS, build_model, parameter_count


def test_the_catalogue_and_the_builders_have_the_same_names() -> None:
    assert MODELS.keys() == CATALOGUE.keys()


@pytest.mark.parametrize(("name", "size"), [("digits-cnn", 8), ("3c1f", 28)])
def test_a_net_maps_images_to_classes(name: str, size: int) -> None:
    model = build_model(name, 7, 1, size)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


def test_3c1f_has_the_published_layers() -> None:
    layers = [layer for layer in build_model("3c1f", 10, 1, 28) if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [
        (128, 1, 3, 3),
        (128, 128, 3, 3),
        (128, 128, 3, 3),
        (500, 9 * 9 * 128),
        (10, 500),
    ]


def test_arguments_reach_the_builder() -> None:
    assert parameter_count(build_model("digits-cnn", 10, 1, 8, width=4)) == 40 + 296 + 128 * 64 + 64 + 650


def test_the_seed_decides_the_weights() -> None:
    first, second = (
        torch.manual_seed(1) and build_model("digits-cnn", 10, 1, 8).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_arguments_are_a_setting_error() -> None:
    with pytest.raises(SettingError, match=r"model digits-cnn with args .*'depth'"):
        build_model("digits-cnn", 10, 1, 8, depth=3)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(SettingError, match="unknown model 'digit-cnn'; did you mean 'digits-cnn'"):
        build_model("digit-cnn", 10, 1, 8)


def test_torchvision_models_take_grey_images() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision/resnet18", 5, 1, 28).eval()
    grey = torch.randn(2, 1, 28, 28)
    assert model(grey).shape == (2, 5)
    color = build_model("torchvision/resnet18", 5, 3, 28).eval()
    color.load_state_dict(model.state_dict())
    assert torch.equal(color(grey.expand(-1, 3, -1, -1)), model(grey))


def test_torchvision_models_that_do_not_exist_are_named() -> None:
    with pytest.raises(SettingError, match="no classification model 'resnet19'; did you mean 'resnet1"):
        build_model("torchvision/resnet19", 5, 3, 28)


def test_torchvision_models_refuse_other_channels() -> None:
    with pytest.raises(SettingError, match="takes 1 or 3 channels; the data have 4"):
        build_model("torchvision/resnet18", 5, 4, 28)
