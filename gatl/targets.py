"""Calls what plain data name by ``_target_``.

Hydra's `instantiate` does more: it resolves interpolations and calls targets within targets. Here,
where the data may come from a stranger's file, they are arguments and no more.
"""

import inspect
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from gatl.errors import UserError


def call(node: Mapping[str, Any], **more: Any) -> Any:  # noqa: ANN401
    """Call a function or class.

    Args:
        node: Its dotted name as `_target_`, and arguments.
        **more: Further arguments.

    Returns:
        What it returns.
    """
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    return resolve_name(node["_target_"])(**arguments, **more)


def require_arguments(key: str, node: Mapping[str, Any], **more: Any) -> None:
    """See whether what plain data name takes their arguments, without calling it.

    Args:
        key: Where they stand in the configuration.
        node: See `call`.
        **more: Further arguments.

    Raises:
        UserError: If it cannot be found, or takes others.
    """
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    try:
        inspect.signature(resolve_name(node["_target_"])).bind(**arguments, **more)
    except Exception as error:  # an import may raise anything
        message = " ".join(str(error).split())
        raise UserError(f"{key}._target_={node['_target_']} cannot be used: {message}.") from error
