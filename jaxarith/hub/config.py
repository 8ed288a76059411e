"""Changes of a `config.json` and of the configurations in it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any


def replaced(
    config: Mapping[str, Any], chosen: Callable[[str, Any], bool], new: Any
) -> dict[str, Any]:
    """The configuration, and those in it, with another value of the chosen entries.

    Example:
      >>> replaced({"a": 1, "text_config": {"a": 2}}, lambda key, _: key == "a", 0)
      {'a': 0, 'text_config': {'a': 0}}
    """
    return {
        key: new
        if chosen(key, value)
        else replaced(value, chosen, new)
        if key.endswith("_config") and isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The configuration, and those in it, without these keys."""
    return {
        key: without(value, keys)
        if key.endswith("_config") and isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if key not in keys
    }
