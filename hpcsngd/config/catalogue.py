"""Names that both the schema (which may not import torch) and the training code must agree on.

``tests/train`` asserts that every name here has its implementation and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

TORCHVISION_PREFIX = "torchvision/"

# name -> what `hpcsngd experiments` and the error for an unknown name say
MODELS: dict[str, str] = {
    "digits-cnn": "two 3x3 convolutions and two linear layers for 8x8 digits",
    "3c1f": "three 3x3 convolutions of 128 channels, max-pool, linear 500, linear classes (28x28 input)",
}


@dataclass(frozen=True)
class DatasetFacts:
    """What the login side must know of a data set.

    Attributes:
        description: one line.
        needs_root: whether files must exist below the data root.
        probes: files or folders below the data root; any of them present means that the data are there.
        system_paths: absolute places where a package manager puts the data.
        get: how a person gets the data.
    """

    description: str
    needs_root: bool = False
    probes: tuple[str, ...] = ()
    system_paths: tuple[str, ...] = ()
    get: str = ""


DATASETS: dict[str, DatasetFacts] = {
    "digits": DatasetFacts("1,797 real 8x8 handwritten digits that come with scikit-learn"),
    "fashion-mnist": DatasetFacts(
        "60,000 + 10,000 images of clothing, 28x28",
        needs_root=True,
        probes=(
            "FashionMNIST/raw/train-images-idx3-ubyte",
            "FashionMNIST/raw/train-images-idx3-ubyte.gz",
            "fashion-mnist/train-images-idx3-ubyte.gz",
            "train-images-idx3-ubyte.gz",
        ),
        system_paths=("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",),
        get="install Debian's package dataset-fashion-mnist, put the four idx files under "
        "<data root>/FashionMNIST/raw, or set data.download=true where the node has internet access",
    ),
}
