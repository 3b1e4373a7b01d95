"""Random number generators that are a function of a few integers."""

import numpy as np
import torch


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the integers (each at least 0) alone.

    So the noise of an image can depend on (seed, its number) and not on who draws it. Streams of
    different integers are independent (numpy's `SeedSequence`), up to torch's generator, which has
    2^32 of them: of 10,000 images, two share a stream once in a hundred times.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
