"""Finds the factors of single parameters, for example the fused experts of a layer.

These are PEFT's `target_parameters`. A module may have several such parameters. The
file nests their pairs of factors without names, so only shapes tell them apart.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from jaxarith.hub.adapter_tensors import BASE_LAYER, Factors
from jaxarith.hub.stored import Stored


def groups(
    factors: Collection[str], targets: Sequence[str] | None, base: Collection[str]
) -> dict[str, list[str]]:
    """Returns the names of the trained parameters of each module that has them.

    Args:
      factors: the names of pairs, as `adapter_tensors.Parts.factors` has them.
      targets: PEFT's `target_parameters`.
      base: the names of the base's tensors, which may have another prefix.
    """
    ends = {".".join(name.split(".")[-2:]) for name in base}
    found = {}
    for module in factors:
        if module.endswith(BASE_LAYER):
            continue
        last = module.rpartition(".")[2]
        names = {f"{module}.{target.rpartition('.')[2]}" for target in targets or ()}
        names = {
            name
            for name in names
            if any(f".{name}".endswith(f".{target}") for target in targets or ())
            and f"{last}.{name.rpartition('.')[2]}" in ends
        }
        if names:
            found[module] = sorted(names)
    return found


def pairs(module: str, factors: Mapping[str, Factors]) -> Iterator[tuple[str, Factors]]:
    """Yields the pairs of factors of a module with their names, the outermost first."""
    name = module
    while name in factors:
        yield name, factors[name]
        name += BASE_LAYER


def assign(
    module: str,
    found: Sequence[Factors],
    parameters: Mapping[str, Stored],
    ranks: Mapping[str, int],
) -> dict[str, Factors]:
    """Returns the pair of factors of each parameter, by the parameter's name.

    Args:
      module: the module that has the parameters.
      found: the module's pairs of factors.
      parameters: the parameters that the adapter may move, by name in the adapter.
      ranks: the ranks of the parameters, by name.

    Raises:
      ValueError: the shapes do not decide which pair belongs to which parameter.
    """
    fitting = [
        [name for name, leaf in parameters.items() if _fits(pair, leaf, ranks[name])]
        for pair in found
    ]
    names = [names[0] for names in fitting if len(names) == 1]
    if len(found) == len(parameters) == len({*names}):
        return dict(zip(names, found, strict=True))
    shapes = ", ".join(f"A {list(x.a.shape)} and B {list(x.b.shape)}" for x in found)
    listed = ", ".join(f"{name} {leaf}" for name, leaf in parameters.items())
    raise ValueError(
        f"{module} has the factors {shapes}. They must belong to {listed}, but the "
        "shapes do not fit, or do not decide which is which. Merge the adapter into a "
        "model in PEFT."
    )


def _fits(pair, leaf, rank):
    experts, *sides = _experts(leaf.shape)
    if not len(pair.a.shape) == len(pair.b.shape) == len(sides) == 2:
        return False
    (total, inputs), (outputs, other) = pair.a.shape, pair.b.shape
    return (
        total == other == rank * experts
        and sorted(sides) == sorted([inputs, outputs])
        and (experts > 1 or sides == [outputs, inputs])
        and leaf.is_floating
    )


def _experts(shape):
    return shape if len(shape) == 3 else (1, *shape)


def lies_in_out(
    name: str, pair: Factors, leaf: Stored, siblings: Collection[Stored]
) -> bool:
    """Whether the experts of a parameter are `[in, out]`, as those of gpt-oss are.

    If the experts are square, the other parameter of the module decides: its first side
    is longer if both are `[out, in]`.

    Raises:
      ValueError: the shapes do not decide it.
    """
    _, *sides = _experts(leaf.shape)
    if len(leaf.shape) == 2 or sides[0] != sides[1]:
        return sides != [pair.b.shape[0], pair.a.shape[1]]
    others = {x.shape for x in siblings if len(x.shape) == 3}
    orders = {shape[1] < shape[2] for shape in others if shape[1] != shape[2]}
    if len(orders) != 1:
        raise ValueError(
            f"{name} has square experts, {leaf}, and no other parameter of the module "
            "shows whether they are [out, in]. Merge the adapter into a model in PEFT."
        )
    return orders.pop()


def product(
    pair: Factors, scaling: float, in_out: bool, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns what the factors add to a parameter, in float32.

    The expert is the slowest index in the rows of A, and the fastest index in the
    columns of B.
    """
    count, *_ = _experts(shape)
    a = pair.a.read().astype(np.float32).reshape(count, -1, pair.a.shape[1])
    b = pair.b.read().astype(np.float32).reshape(pair.b.shape[0], -1, count)
    delta = np.empty(_experts(shape), np.float32)
    for expert in range(count):
        one = b[:, :, expert] @ a[expert]
        np.multiply(one.T if in_out else one, np.float32(scaling), out=delta[expert])
    return delta.reshape(shape)
