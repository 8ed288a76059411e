"""Reads the `parameters` of mergekit's files: values, gradients and filters."""

from jaxarith.commands.merge import methods
from jaxarith.commands.merge.gradients import Entry, Setting, Value
from jaxarith.commands.merge.methods import Method, Option
from jaxarith.commands.merge.yaml_lines import Node


def parameters(
    node: Node | None, name: str, method: Method, model: str | None
) -> dict[str, Setting]:
    """Returns the settings under a key `parameters`; none without the key.

    Args:
      node: the mapping.
      name, method: the merge method.
      model: the model with the mapping in its entry; None at the top and in a slice.

    Raises:
      ValueError: a parameter is unknown, is not for single models, or has a wrong
        value.
    """
    if node is None:
        return {}
    fields = node.fields(method.options, f"parameters of {name}")
    for key, found in fields.items():
        if model is not None and not method.options[key].each:
            raise found.error(
                f"{key} of {name} has one value for all models. Put it under the "
                "parameters at the top."
            )
    return {
        key: _setting(found, key, method.options[key]) for key, found in fields.items()
    }


def _setting(node: Node, key: str, option: Option) -> Setting:
    if isinstance(node.value, dict):
        return (_entry(node, key, option),)
    if isinstance(node.value, list):
        items = node.items(key)
        if any(isinstance(item.value, dict) for item in items):
            return tuple(_entry(item, key, option) for item in items)
    return (Entry(_value(node, key, option)),)


def _entry(node: Node, key: str, option: Option) -> Entry:
    fields = node.fields(("filter", "value"), key)
    if "value" not in fields:
        raise node.error(f"this entry of {key} has no value.")
    value = _value(fields["value"], key, option)
    part = fields.get("filter")
    if part is None or part.value is None:
        return Entry(value)
    if not option.by_path:
        raise part.error(f"{key} has one value for all tensors. Remove the filter.")
    return Entry(value, part.text("filter"))


def _value(node: Node, key: str, option: Option) -> Value | tuple[Value, ...]:
    """Returns one value, or the values of a gradient."""
    if not isinstance(node.value, list):
        return _scalar(node, key, option)
    if not option.by_path:
        raise node.error(f"{key} has one value for all tensors; found a list.")
    return tuple(_scalar(item, key, option) for item in node.items(key))


def _scalar(node: Node, key: str, option: Option) -> Value:
    if node.value is None or isinstance(node.value, dict | list):
        raise node.error(f"{key} must be one value; found {node.shown()}.")
    try:
        return methods.converted(node.value, option)
    except ValueError as error:
        raise node.error(f"{key} {error}") from error
