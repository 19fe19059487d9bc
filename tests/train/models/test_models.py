from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hpcsngd.config.catalogue import MODELS as CATALOGUE
from hpcsngd.train.faults import SettingError
from hpcsngd.train.models import MODELS, build_model, parameter_count, resnet
from hpcsngd.train.models.blurpool import Blurred


def test_the_catalogue_and_the_builders_have_the_same_names() -> None:
    assert MODELS.keys() == CATALOGUE.keys()


#: What makes a network small enough to run here.
SMALL: dict[str, dict[str, Any]] = {
    **{name: {"width": 4} for name in MODELS},
    "mobilenetv2": {"width": 8},
    "lenet5": {},
    "linear": {},
}
GREY = {"digits-cnn": 8, "3c1f": 28, "lenet5": 28, "cnn1": 28}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "unet"])
def test_a_net_maps_images_to_classes(name: str) -> None:
    channels, size = (1, GREY[name]) if name in GREY else (3, 32)
    model = build_model(name, 7, channels, size, **SMALL[name])
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


#: name, classes, arguments, parameters, where the number is published (or else follows from).
PUBLISHED: list[tuple[str, int, dict[str, Any], int]] = [
    ("3c1f", 10, {}, 5_485_958),  # HyLo's sizes: 9*9*128 x 500, see test_3c1f_has_the_published_layers
    ("lenet5", 10, {}, 61_706),  # OptML study, as are the next six
    ("cnn1", 10, {}, 1_199_882),
    ("lenet5-tanh", 1000, {}, 146_156),  # CS535 study
    ("cnn2", 10, {}, 2_122_186),
    ("cnn2", 100, {}, 2_168_356),
    ("resnet18-cifar", 10, {}, 11_173_962),
    ("resnet18-cifar", 100, {}, 11_220_132),
    ("resnet20", 10, {}, 269_722),  # He et al., table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million
    ("resnet32", 10, {}, 464_154),
    ("resnet44", 10, {}, 658_586),
    ("resnet56", 10, {}, 853_018),
    ("resnet110", 10, {}, 1_727_962),
    ("resnet20", 10, {"shortcut": "project"}, 272_474),  # EFCP's ResNet-20
    ("resnet32", 10, {"bias": True}, 464_154 + 16 * 11 + 32 * 10 + 64 * 10),  # HyLo's
    ("wrn28-10", 10, {}, 36_479_194),  # Zagoruyko and Komodakis, tables 1 and 4: 36.5, 2.2, 8.9 million
    ("wrn28-10", 100, {}, 36_536_884),
    ("wrn28-20", 10, {}, 145_815_514),
    ("wrn40-2", 10, {}, 2_243_546),
    ("wrn40-4", 10, {}, 8_949_210),
    ("wrn22-2", 10, {}, 1_079_642),
    ("wrn22-4", 10, {}, 4_298_970),
    ("vgg16", 10, {}, 14_728_266),
    ("vgg16", 100, {}, 14_774_436),
    ("vgg19", 10, {}, 20_040_522),
    ("densenet", 10, {"depth": 100, "width": 12}, 769_162),  # Huang et al., table 2: 0.8 million
    ("densenet", 100, {}, 2_975_700),  # HyLo's, see test_hylos_densenet_has_its_layers
    ("mobilenetv2", 10, {}, 2_236_682),  # torchvision's with 10 classes
    ("unet", 1, {}, 7_763_041),  # Buda et al.
]


@pytest.mark.parametrize(("name", "classes", "arguments", "count"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(
    name: str, classes: int, arguments: dict[str, Any], count: int
) -> None:
    channels, size = (1, GREY[name]) if name in GREY else (3, 32)
    with torch.device("meta"):
        model = build_model(name, classes, channels, size, **arguments)
    assert parameter_count(model) == count


def test_lenet_takes_larger_images_too() -> None:
    """The first linear layer then takes all 9x9 positions of the third convolution."""
    model = build_model("lenet5-tanh", 1000, 3, 64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    assert parameter_count(model) == 146_156 + (120 * 9 * 9 - 120) * 84 == 952_556


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("resnet152", 60_192_808),
        ("resnext50_32x4d", 25_028_904),
        ("densenet121", 7_978_856),
        ("densenet201", 20_013_928),
        ("mobilenet_v2", 3_504_872),
        ("vgg16", 138_357_544),
        ("vgg19_bn", 143_678_248),
        # without the second head of 3,326,696
        ("inception_v3", 27_161_264 - 3_326_696),
    ],
)
def test_torchvisions_models_have_their_published_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameter_count(build_model(f"torchvision/{name}", 1000, 3, 224)) == count


def test_hylos_densenet_has_its_layers() -> None:
    with torch.device("meta"):
        layers = [
            tuple(layer.weight.shape[:2])
            for layer in build_model("densenet", 100, 3, 32).modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        ]
    # a stem of twice the growth, three blocks of two pairs, halved in between
    pairs = [(400, 200), (100, 400), (400, 300), (100, 400)]
    assert layers == [
        (200, 3), *pairs, (200, 400), *pairs, (200, 400), *pairs, (100, 400),
    ]  # fmt: skip


def test_networks_with_two_heads_have_one_output_in_training() -> None:
    model = build_model("torchvision/inception_v3", 5, 3, 75).train()
    assert model(torch.randn(2, 3, 75, 75)).shape == (2, 5)


def test_unet_gives_one_logit_for_each_pixel() -> None:
    model = build_model("unet", 1, 3, 32, width=4).eval()
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 1, 32, 48)
    with pytest.raises(SettingError, match="a multiple of 16 pixels, not 40"):
        build_model("unet", 1, 3, 40)


def test_small_images_are_refused_where_they_would_vanish() -> None:
    with pytest.raises(SettingError, match="28 pixels are under 32"):
        build_model("vgg16", 10, 1, 28)
    with pytest.raises(SettingError, match="densenet of depth 9"):
        build_model("densenet", 10, 3, 32, depth=9)
    with pytest.raises(SettingError, match="shortcut 'conv'; allowed: pad, project"):
        build_model("resnet20", 10, 3, 32, shortcut="conv")


def test_shortcuts_without_parameters_fill_up_with_zeros() -> None:
    block = resnet.Block(2, 4, 2)
    for weight in (block.conv1.weight, block.conv2.weight):
        nn.init.zeros_(weight)
    x = torch.rand(1, 2, 4, 4)
    out = block.eval()(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert out[:, 2:].abs().max() == 0


def test_weights_are_drawn_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", 10, 3, 32, bias=True)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 64:
            # 36,864 numbers: their deviation is within 2 % of sqrt(2 / inputs), five deviations of its own
            assert layer.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
            assert layer.bias is not None
            assert layer.bias.abs().max() == 0


def test_hylos_mobilenet_mixes_channels_and_is_half_as_wide() -> None:
    with torch.device("meta"):
        plain, dense = (build_model("mobilenetv2", 10, 3, 32, dense=dense) for dense in (False, True))
    shapes = [
        [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        for model in (plain, dense)
    ]
    assert len(shapes[0]) == len(shapes[1]) == 52
    assert shapes[0][4] == (96, 1, 3, 3)
    assert shapes[1][4] == (48, 48, 3, 3)


class TestBlurPool:
    def test_strided_convolutions_see_a_blurred_input(self) -> None:
        torch.manual_seed(0)
        plain = build_model("resnet20", 10, 3, 32)
        blurred = build_model("resnet20", 10, 3, 32, blurpool=True)
        found = [name for name, layer in blurred.named_modules() if isinstance(layer, Blurred)]
        # the first of the second and of the third width; the stem has three channels and no stride
        assert found == ["6.conv1", "9.conv1"]
        assert parameter_count(blurred) == parameter_count(plain)
        assert sum(isinstance(layer, nn.Conv2d) for layer in blurred.modules()) == 19

    def test_the_blur_is_the_binomial_filter(self) -> None:
        conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        layer = Blurred(conv)
        spot = torch.zeros(1, 16, 7, 7)
        spot[0, 3, 3, 3] = 1.0
        expected = torch.zeros(1, 16, 7, 7)
        expected[0, 3, 2:5, 2:5] = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        assert torch.allclose(layer(spot), conv(expected), atol=1e-7)

    def test_torchvisions_networks_take_it(self) -> None:
        with torch.device("meta"):
            model = build_model("torchvision/resnet18", 10, 3, 64, blurpool=True)
        # two in each of the three halving stages: the block's first convolution and its shortcut
        assert sum(isinstance(layer, Blurred) for layer in model.modules()) == 6


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
