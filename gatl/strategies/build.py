"""From the configuration to the strategy."""

import re

from hydra.utils import instantiate

from gatl.config import Config
from gatl.errors import UserError
from gatl.strategies.base import Strategy


def build_strategy(config: Config) -> Strategy:
    """Build what ``search=`` names; its settings are checked by itself.

    Raises:
        UserError: If one of them is wrong.
    """
    try:
        build = instantiate(config.search, _partial_=True, _convert_="all")
        strategy = build(space=config.space, seed=config.seed, initial=config.initial)
    except Exception as error:  # a target may raise anything
        message = (str(error).splitlines() or [type(error).__name__])[0]
        of_setting = re.match(r"\w*", message)[0] in config.search  # type: ignore[index]
        raise UserError(
            f"search.{message}" if of_setting else f"search cannot be built: {message}"
        ) from error
    if not isinstance(strategy, Strategy):
        raise UserError(f"search._target_={config.search['_target_']} makes no strategy.")
    return strategy
