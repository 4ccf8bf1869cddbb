"""What the tests of all strategies share."""

import pytest
from hypothesis import strategies as st

from gatl.chromosome import Gene, SearchSpace, Value


@st.composite
def _spaces(draw: st.DrawFn) -> SearchSpace:
    """Any search space: narrowed, fixed, with genes added, in any order."""

    def gene(name: str, low: Value, high: Value) -> Gene:
        numbers: st.SearchStrategy[Value] = (
            st.integers(low, high)
            if isinstance(low, int) and isinstance(high, int)
            else st.floats(low, high)
        )
        ends = draw(st.tuples(numbers, numbers))
        fixed = draw(st.booleans()) and draw(st.booleans())
        low, high = min(ends), min(ends) if fixed else max(ends)
        return Gene(name, low, high, log=low > 1e-12 and draw(st.booleans()))

    included = gene("included_layers", 1, 58)
    frozen = gene("frozen_layers", 0, 18)
    if frozen.low > included.low:
        frozen = Gene("frozen_layers", included.low, max(included.low, frozen.high))
    genes = [included, frozen, gene("learning_rate", 1e-9, 1.0), gene("dropout", 0.0, 0.99)]
    if draw(st.booleans()):
        genes.append(gene("weight_decay", 0.0, 1.0))
    return SearchSpace(tuple(draw(st.permutations(genes))))


@pytest.fixture(scope="session")
def spaces() -> st.SearchStrategy[SearchSpace]:
    """Any search space, for property tests."""
    return _spaces()


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    """The default search space of SE-DenseNet-121."""
    return SearchSpace(
        (
            Gene("included_layers", 1, 58),
            Gene("frozen_layers", 0, 18),
            Gene("learning_rate", 1e-6, 1e-1, log=True),
            Gene("dropout", 0.1, 0.9),
        )
    )
