"""Wrappers by name: changes of a merged vector before it is written.

A flag says `--after lines:beta=0.5`, a YAML file `after: [{lines: {beta: 0.5}}]`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxarith.commands.merge import gradients
from jaxarith.commands.merge.gradients import Value
from jaxarith.commands.merge.methods import NONE, NUMBER, PATTERN, Option, converted
from jaxarith.merge import wrapped
from jaxarith.merge.isotropise import plan as isotropise
from jaxarith.merge.lines import plan as lines
from jaxarith.merge.polarize import plan as polarize
from jaxarith.merge.subspace_boosting import plan as subspace_boosting
from jaxarith.merge.svc import plan as svc


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A wrapper of the command.

    Attributes:
      plan: `plan(rows, **options) -> wrapped.Plan`.
      options: the options of the wrapper by name.
      deep: whether it takes the `depths` of the layers.
    """

    plan: Callable[..., wrapped.Plan]
    options: Mapping[str, Option]
    deep: bool = False


_COMMON = {"coef": NUMBER, "matrices": PATTERN}
_SIDED = _COMMON | {"in_out": PATTERN}
WRAPPERS: dict[str, Wrapper] = {
    "svc": Wrapper(functools.partial(svc, in_out=NONE), {"alpha": NUMBER, **_SIDED}),
    "lines": Wrapper(
        lines,
        {"beta": dataclasses.replace(NUMBER, required=True), "alpha": NUMBER},
        deep=True,
    ),
    "subspace_boosting": Wrapper(subspace_boosting, {"beta": NUMBER, **_COMMON}),
    "isotropise": Wrapper(isotropise, _COMMON),
    "polarize": Wrapper(functools.partial(polarize, in_out=NONE), _SIDED),
}


class After(NamedTuple):
    """A wrapper that is asked for.

    Attributes:
      name: name of the wrapper.
      options: the given options, in their types.
    """

    name: str
    options: Mapping[str, Value]

    @property
    def plain(self) -> Any:
        """Returns the wrapper in the form of a YAML file."""
        return {self.name: dict(self.options)} if self.options else self.name

    def planned(
        self, config: Mapping[str, Any]
    ) -> Callable[[wrapped.Rows], wrapped.Plan]:
        """Returns the plan as a function of the tensors, for a `config.json`."""
        wrapper = WRAPPERS[self.name]

        def plan(rows):
            options: dict[str, Any] = dict(self.options)
            if wrapper.deep:
                options["depths"] = gradients.depths(rows, config)
            return wrapper.plan(rows, **options)

        return plan


def after(name: str, given: Mapping[str, Any]) -> After:
    """Returns a wrapper with its options, which may be texts.

    Raises:
      ValueError: the wrapper or an option is unknown, or an option is missing or has an
        invalid value.
    """
    if name not in WRAPPERS:
        raise ValueError(
            f"there is no wrapper {name!r}; known are {', '.join(WRAPPERS)}."
        )
    known = WRAPPERS[name].options
    for key in given:
        if key not in known:
            raise ValueError(
                f"{name} has no option {key!r}; it has {', '.join(known)}."
            )
    for key, option in known.items():
        if option.required and key not in given:
            raise ValueError(f"{name} needs {key}, for example {name}:{key}=0.5.")
    options = {}
    for key, value in given.items():
        try:
            options[key] = converted(value, known[key])
        except ValueError as error:
            raise ValueError(f"{key} of {name} {error}") from error
    return After(name, options)


def of_text(text: str) -> After:
    """Parses the value of a flag: `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`.

    Example:
      >>> of_text("svc:alpha=1,coef=0.5")
      After(name='svc', options={'alpha': 1.0, 'coef': 0.5})
    """
    name, colon, rest = text.partition(":")
    words = re.split(r",(?=\w+=)", rest) if colon else []
    pairs = [word.partition("=") for word in words]
    if not all(key and equals for key, equals, _ in pairs):
        raise ValueError(f"--after is {text!r}; expected NAME or NAME:OPTION=VALUE,….")
    return after(name, {key: value for key, _, value in pairs})


def then(
    merge: Callable, wanted: Sequence[After], config: Mapping[str, Any]
) -> Callable:
    """Returns a merge followed by all wrappers, as one merge from files to files."""
    for one in wanted:
        merge = wrapped.streamed(one.planned(config), merge)
    return merge


def table() -> Iterable[str]:
    """Yields lines for the command's help."""
    for name, wrapper in WRAPPERS.items():
        yield f"    {name:<18}{' '.join(wrapper.options)}"
