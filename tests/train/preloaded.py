"""What a training rank imports, for the fork server: once for all ranks of all tests."""

import sklearn.datasets  # noqa: F401

import hpcsngd.train.session  # noqa: F401
from hpcsngd.train import vision

vision.load()
