"""What a training rank imports, for the fork server: once for all ranks of all tests."""

import sklearn.datasets  # noqa: F401

import hpcsngd.train.session  # noqa: F401
from hpcsngd.train import vision
from hpcsngd.train.text import hub

vision.load()
# what encoders need; transformers imports each of its classes where it is first named
library = hub.transformers()
MODELS = (library.BertForSequenceClassification, library.BertForQuestionAnswering, library.BertTokenizerFast)
METRICS = hub.torchmetrics_text()
