"""Which samples each worker of a parameter server trains on.

    shared            every worker has all samples, each in an order of its own
    split             N parts of a random order that differ by at most one sample
    labels            labels are dealt out, label by label in a random order, to the workers in turn; then all
                      workers are cut to the smallest one's size, so that none does more updates than others
    labels_unscaled   the same without the cut: workers with more samples do more updates

Every sample belongs to at most one worker, but for ``shared``. With labels, every worker must get as many
labels as the others (`labels`) or at least one (`labels_unscaled`): anything else is refused.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hpcsngd.train import seeds
from hpcsngd.train.faults import SettingError
from hpcsngd.train.sampler import even_parts

Partition = Literal["shared", "split", "labels", "labels_unscaled"]


def parts(kind: Partition, labels: Tensor, workers: int, seed: int) -> list[Tensor]:
    """Returns each worker's sample indices, int64 and in no particular order.

    Args:
        kind: see above.
        labels: of all training samples, shape ``(n,)``.
        workers: N.
        seed: of the draw.

    Raises:
        SettingError: the samples or labels cannot be shared among so many workers.
    """
    if kind not in get_args(Partition):
        raise SettingError(f"partition {kind!r}: allowed are {', '.join(get_args(Partition))}")
    if len(labels) < workers:
        raise SettingError(f"{len(labels)} training samples cannot be shared by {workers} workers")
    if kind == "shared":
        return [torch.arange(len(labels))] * workers
    if kind == "split":
        order = torch.randperm(len(labels), generator=seeds.generator(seed, "partition"))
        return list(torch.split(order, even_parts(len(labels), workers)))
    found = _by_label(labels, workers, seed, is_scaled=kind == "labels")
    smallest = min(len(part) for part in found)
    return [part[:smallest] for part in found] if kind == "labels" else found


def _by_label(labels: Tensor, workers: int, seed: int, *, is_scaled: bool) -> list[Tensor]:
    present: list[int] = sorted(set(labels.tolist()))
    count = len(present)
    if count < workers or (is_scaled and count % workers):
        allowed = [n for n in range(1, count + 1) if not is_scaled or count % n == 0]
        raise SettingError(
            f"{count} labels cannot be dealt out to {workers} workers"
            + (" so that each has as many" if is_scaled else "")
            + f"; allowed: {', '.join(map(str, allowed))}"
        )
    generator = seeds.generator(seed, "partition")
    dealt = [present[index] for index in torch.randperm(count, generator=generator).tolist()]
    mine = [dealt[worker::workers] for worker in range(workers)]
    found = [torch.isin(labels, torch.tensor(own, dtype=labels.dtype)).nonzero()[:, 0] for own in mine]
    # in random order, so that a cut takes no label's samples in particular
    return [part[torch.randperm(len(part), generator=generator)] for part in found]
