"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, no download."""

import numpy as np

from gatl.data.source import Source, in_memory


def load() -> Source:
    """Load the ten digits as one training split (Alpaydin & Kaynak 1998, UCI's test part)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # grey values are 0 to 16
    classes = tuple(str(name) for name in digits.target_names)
    return Source(classes, in_memory(images, digits.target, "digits"))
