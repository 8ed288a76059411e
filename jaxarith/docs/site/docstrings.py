"""An extension of griffe, which reads the sources: formulas in docstrings."""

from typing import Any

import formulas
import griffe


class Formulas(griffe.Extension):
    """Changes the docstring of every object once, when its module is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = formulas.as_markdown(obj.docstring.value)
