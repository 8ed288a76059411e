"""An extension of griffe, which reads the sources: formulas and names in docstrings."""

from typing import Any

import api
import formulas
import griffe


class Markdown(griffe.Extension):
    """Changes the docstring of every object once, when its module is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            returns = obj.returns if isinstance(obj, griffe.Function) else None
            text = formulas.as_markdown(obj.docstring.value, str(returns or ""))
            obj.docstring.value = api.linked(text)
