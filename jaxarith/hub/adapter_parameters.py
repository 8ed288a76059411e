"""Factors of parameters rather than modules, such as the fused experts of a layer.

PEFT's `target_parameters`. A module may have several such parameters; their pairs of
factors are nested in the file and not named, so that their shapes must tell them apart.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from jaxarith.hub.adapter_tensors import BASE_LAYER, Factors
from jaxarith.hub.stored import Stored


def groups(
    factors: Collection[str], targets: Sequence[str] | None, base: Collection[str]
) -> dict[str, list[str]]:
    """By module with factors of parameters, the names of these parameters.

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
    """The pairs of factors of a module, from the outermost."""
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
    """The pair of each parameter, by its name.

    Args:
      module: the module that has the parameters.
      found: its pairs of factors.
      parameters: by name in the adapter, the parameters that the adapter may move.
      ranks: by name, their ranks.

    Raises:
      ValueError: shapes do not tell which pair is whose.
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
        f"{module} has the factors {shapes}, which must be those of {listed}, each "
        "with one of another shape. Merge the adapter into a model in PEFT."
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

    Of square ones, the other parameter of the module tells: where one of the two is
    square, the first side of the other is longer if they are `[out, in]`.

    Raises:
      ValueError: nothing tells.
    """
    _, *sides = _experts(leaf.shape)
    if len(leaf.shape) == 2 or sides[0] != sides[1]:
        return sides != [pair.b.shape[0], pair.a.shape[1]]
    others = {x.shape for x in siblings if len(x.shape) == 3}
    orders = {shape[1] < shape[2] for shape in others if shape[1] != shape[2]}
    if len(orders) != 1:
        raise ValueError(
            f"{name} has square experts, {leaf}, and no other parameter of the module "
            "tells whether they are [out, in]. Merge the adapter into a model in PEFT."
        )
    return orders.pop()


def product(
    pair: Factors, scaling: float, in_out: bool, shape: tuple[int, ...]
) -> np.ndarray:
    """What the factors add to a parameter, in float32.

    The expert is the slowest index of the rows of A and the fastest of the columns of
    B.
    """
    count, *_ = _experts(shape)
    a = pair.a.read().astype(np.float32).reshape(count, -1, pair.a.shape[1])
    b = pair.b.read().astype(np.float32).reshape(pair.b.shape[0], -1, count)
    delta = np.empty(_experts(shape), np.float32)
    for expert in range(count):
        one = b[:, :, expert] @ a[expert]
        np.multiply(one.T if in_out else one, np.float32(scaling), out=delta[expert])
    return delta.reshape(shape)
