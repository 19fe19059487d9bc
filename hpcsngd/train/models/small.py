"""Small networks: for digits, for Fashion-MNIST, and the linear one."""

from __future__ import annotations

from torch import nn


def digits_cnn(num_classes: int, in_channels: int, image_size: int, *, width: int = 16) -> nn.Module:
    """Returns two 3x3 convolutions and two linear layers.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 2.
        width: channels of the first convolution; the second has twice as many.
    """
    side = image_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def conv3_linear(num_classes: int, in_channels: int, image_size: int, *, width: int = 128) -> nn.Module:
    """Returns HyLo's 3C1F: three 3x3 convolutions, max-pool 3, linear 500, linear classes.

    Source: the published code of Mu et al., "HyLo", SC 2022. For 28x28 images the first linear layer has
    9*9*128 inputs, and the whole network 5,485,958 parameters.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 3.
        width: channels of every convolution.
    """
    side = image_size // 3
    convolutions: list[nn.Module] = []
    for channels in (in_channels, width, width):
        convolutions += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    head = [nn.Linear(side * side * width, 500), nn.ReLU(), nn.Linear(500, num_classes)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(3), nn.Flatten(), *head)


def lenet5(num_classes: int, in_channels: int, image_size: int, *, width: int = 6) -> nn.Module:
    """Returns LeNet-5 with ReLU and max-pooling; 61,706 parameters for 28x28 grey images and 10 classes.

    Source: LeCun et al., Proceedings of the IEEE 1998, figure 2, as the OptML study of asynchronous SGD
    (2023) uses it.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 12.
        width: channels of the first convolution; the second has 8/3 as many.
    """
    wide, side = 16 * width // 6, (image_size // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, wide, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(wide * side * side, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def lenet5_tanh(num_classes: int, in_channels: int, image_size: int, *, width: int = 6) -> nn.Module:
    """Returns LeNet-5 with tanh and average pooling; 146,156 parameters for 32x32 in color and 1000 classes.

    Source: LeCun et al., Proceedings of the IEEE 1998, figure 2, as the CS535 study of distributed L-BFGS
    (2023) uses it, which is for 32x32 alone. For larger images the third convolution leaves maps larger than
    1x1, as LeCun et al. say, and the first linear layer takes all of them: 952,556 parameters for 64x64.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 32.
        width: channels of the first convolution; the second and third have 8/3 and 20 times as many.
    """
    wide, widest = 16 * width // 6, 20 * width
    side = ((image_size - 4) // 2 - 4) // 2 - 4
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, wide, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(wide, widest, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(widest * side * side, 84),
        nn.Tanh(),
        nn.Linear(84, num_classes),
    )


def cnn1(num_classes: int, in_channels: int, image_size: int, *, width: int = 32) -> nn.Module:
    """Returns two 3x3 convolutions without padding, pool, linear 128; 1,199,882 parameters for MNIST.

    Source: the second network for MNIST and Fashion-MNIST of the OptML study of asynchronous SGD (2023).

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 6.
        width: channels of the first convolution; the second has twice as many.
    """
    side = (image_size - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, num_classes),
    )


def cnn2(num_classes: int, in_channels: int, image_size: int, *, width: int = 32) -> nn.Module:
    """Returns two 3x3 convolutions, each with a pool, and linear 512.

    Source: the second network for CIFAR of the OptML study of asynchronous SGD (2023), which has 2,122,186
    parameters for 10 classes and 2,168,356 for 100. The places of its dropout are ours: as in `cnn1`.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels; at least 4.
        width: channels of the first convolution; the second has twice as many.
    """
    side = image_size // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, 512),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(512, num_classes),
    )


def linear(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Returns one linear layer: logistic regression on stored features, which are images of one pixel.

    Args:
        num_classes: size of the output.
        in_channels: channels of the images, or number of features.
        image_size: height and width of the images in pixels; 1 for features.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
