"""Changes entries of a `config.json` and of the configurations inside it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any


def parts(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the configurations inside a configuration, for example `text_config`."""
    return {
        key: value
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping)
    }


def replaced(
    config: Mapping[str, Any], chosen: Callable[[str, Any], bool], new: Any
) -> dict[str, Any]:
    """Returns the configuration with a new value for the chosen entries.

    Entries of the configurations inside it are replaced as well.

    Example:
      >>> replaced({"a": 1, "text_config": {"a": 2}}, lambda key, _: key == "a", 0)
      {'a': 0, 'text_config': {'a': 0}}
    """
    inner = {k: replaced(part, chosen, new) for k, part in parts(config).items()}
    return {
        key: new if chosen(key, value) else inner.get(key, value)
        for key, value in config.items()
    }


def without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Returns the configuration, and those inside it, without these keys."""
    inner = {key: without(part, keys) for key, part in parts(config).items()}
    whole = {**config, **inner}
    return {key: value for key, value in whole.items() if key not in keys}
