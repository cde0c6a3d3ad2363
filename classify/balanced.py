"""Every class drawn equally often, however many images it has: the control that tells balance from synthesis."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """Indices of PlaneImages, as many a pass as it has images, every class equally often (a remainder aside).

    Images of a class are drawn with replacement, a function of (seed, pass). One that is drawn again has another of its
    indices, and so is augmented anew: else a rare class would be seen in fewer forms than a common one.
    """

    def __init__(self, targets: Sequence[int], seed: int):
        self.targets, self.seed, self.passes = np.array(targets), seed, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[int]:
        rng, count = np.random.default_rng((self.seed, self.passes, 2)), len(self)  # 2: of its own
        self.passes += 1
        classes = rng.permutation(np.unique(self.targets))
        drawn = np.empty(count, dtype=np.int64)
        for n, target in enumerate(classes):
            drawn[n :: len(classes)] = rng.choice(np.flatnonzero(self.targets == target), len(drawn[n :: len(classes)]))
        return iter(rng.permutation(drawn + count * np.arange(count)).tolist())
