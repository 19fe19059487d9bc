"""Compression with error feedback, usable on its own: of a stream of vectors, or around any torch optimizer.

::

    rule = BlockTopK(size, density=0.01)
    sender = ErrorFeedback(rule, value_dtype=torch.bfloat16, dtype=torch.float32, device=vector.device)
    values, positions = sender.send(vector)

`LowRankFeedback` sends factors of each tensor instead; `TopKFeedback` wraps an optimizer.
"""

from hpcsngd.optim.lowrank import LowRankFeedback, matrix_shape
from hpcsngd.optim.sparsified import TopKFeedback
from hpcsngd.optim.topk import BlockTopK, ErrorFeedback

__all__ = ["BlockTopK", "ErrorFeedback", "LowRankFeedback", "TopKFeedback", "matrix_shape"]
