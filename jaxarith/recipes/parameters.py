"""The parameters of a merge in a YAML file: checked, as settings of `gradients`."""

from typing import Any

from jaxarith.recipes import methods
from jaxarith.recipes.methods import Method, Option
from jaxarith.recipes.yaml_lines import Node


def parameters(
    node: Node | None, name: str, method: Method, model: str | None
) -> dict[str, Any]:
    """The settings under a `parameters`, of which there may be none.

    Args:
      node: the mapping.
      name, method: the merge method.
      model: the model whose entry it is in, or None at the top and in a slice.

    Raises:
      ValueError: a parameter is not known, is none of a model, or has a wrong value.
    """
    if node is None:
        return {}
    fields = node.fields(method.options, f"parameters of {name}")
    for key, found in fields.items():
        if model is not None and not method.options[key].each:
            raise found.error(
                f"{key} of {name} is one for all models; it belongs under the "
                "parameters at the top."
            )
    return {
        key: _setting(found, key, method.options[key]) for key, found in fields.items()
    }


def _setting(node, key, option: Option):
    if isinstance(node.value, dict):
        return [_conditional(node, key, option)]
    if not isinstance(node.value, list):
        return _scalar(node, key, option)
    items = node.items(key)
    if any(isinstance(item.value, dict) for item in items):
        return [_conditional(item, key, option) for item in items]
    return _gradient(node, key, option)


def _conditional(node, key, option):
    fields = node.fields(("filter", "value"), key)
    if "value" not in fields:
        raise node.error(f"this entry of {key} has no value.")
    found = fields["value"]
    value = (_gradient if isinstance(found.value, list) else _scalar)(
        found, key, option
    )
    part = fields.get("filter")
    if part is None or part.value is None:
        return {"value": value}
    if not option.by_path:
        raise part.error(f"{key} is one for all tensors; it has no filter.")
    return {"filter": part.text("filter"), "value": value}


def _gradient(node, key, option):
    if not option.by_path:
        raise node.error(f"{key} is one for all tensors; found a list.")
    return [_scalar(item, key, option) for item in node.items(key)]


def _scalar(node, key, option):
    if node.value is None or isinstance(node.value, dict | list):
        raise node.error(f"{key} must be one value; found {node.shown()}.")
    try:
        return methods.converted(node.value, option)
    except ValueError as error:
        raise node.error(f"{key} {error}") from error
