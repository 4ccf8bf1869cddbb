"""Independent random streams, one per purpose.

Every random decision of gatl comes from a stream that is named by what it is
for, never from a global generator, so that no decision depends on the order in
which others were made.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. Values start at 1 and are part of a run's identity."""

    SPLIT = 1
    INITIAL = 2
    OFFSPRING = 3
    FIT = 4
    REEVALUATION = 5
    FINAL = 6
    ACCEPTANCE = 7
    SAMPLER = 8


def generator(seed: int, purpose: Purpose, a: int = 0, b: int = 0) -> np.random.Generator:
    """Return the generator of one stream.

    Args:
        seed: The run's seed, in [0, 2**32).
        purpose: What the numbers are for.
        a: First index within the purpose, at least 0.
        b: Second index within the purpose, at least 0.

    Returns:
        A generator that depends on the four words alone. They are always four,
        because numpy pads short seeds with zeros: (7, 3) and (7, 3, 0) would be
        one stream.
    """
    return np.random.default_rng((seed, int(purpose), a, b))
