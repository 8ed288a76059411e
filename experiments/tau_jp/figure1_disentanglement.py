"""Figure 1: disentanglement error ξ of pairs of tasks, sorted by their τJp.

Yoshida et al. Mastering Task Arithmetic. ICLR 2025: sections 3.2 and 4.1.

    python -m experiments.tau_jp.figure1_disentanglement --data-dir DATA
    python -m experiments.tau_jp.figure1_disentanglement --data-dir DATA \\
        --pairs dtd gtsrb eurosat svhn

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

The upper row shows Linear FT, the lower row Ours. Both coefficients run from -3 to 3 in
21 values, as in the code. The paper does not say which pairs it shows. By default all
pairs are sorted by the τJp of Linear FT, and pairs at even ranks are shown, the
smallest on the left. ξ is measured on 2048 test samples of each task; the paper does
not state its number.

Published, as heat maps only: "when τJp is large, the blue area becomes more prominent,
indicating that the weight disentanglement error is more sensitive to each coefficient";
in the lower row "weight disentanglement is significantly enhanced".
"""

import dataclasses

import numpy as np

from experiments.common import runs, script, tables
from experiments.common.vision import options, pairwise, setups, vectors
from experiments.tau_jp import pairs
from jaxarith import plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.OneModel):
    pairs: tuple[tuple[str, str], ...] = ()
    """Names of tasks, two per pair; by default the script chooses --columns pairs."""
    columns: int = 4
    """Number of pairs to choose."""
    grid_samples: int = 2048
    """Number of test samples of each task for ξ, drawn with a fixed seed."""


def named(pairs: tuple[tuple[str, str], ...], names: list[str]) -> set[tuple]:
    """Converts pairs of names to pairs of indices, the smaller one first.

    Raises:
      ValueError: a pair does not name two of the tasks.
    """
    for pair in pairs:
        if len(set(pair)) < 2 or not set(pair) <= set(names):
            raise ValueError(f"--pairs names {pair}; give two of {', '.join(names)}.")
    return {tuple(sorted(names.index(name) for name in pair)) for pair in pairs}


def at_even_ranks(order: list, count: int) -> list:
    """Returns `count` items of a list, evenly spaced from the first to the last.

    Example:
      >>> at_even_ranks(["a", "b", "c", "d", "e"], 3)
      ['a', 'c', 'e']
    """
    ranks = np.linspace(0, len(order) - 1, min(count, len(order)))
    return [order[rank] for rank in ranks.round().astype(int)]


@script.full_precision
def main(config: Config) -> dict:
    config = options.smoke(config, columns=2, grid_samples=48)
    # Checked before anything is loaded or trained.
    wanted = named(config.pairs, [task.partition("=")[0] for task in config.tasks])
    runs.start(config)
    coefs = np.linspace(-3, 3, 3 if config.smoke else 21)
    setup = setups.load(config, config.model)
    taus = {name: vectors.vectors(setup, m) for name, m in pairs.METHODS.items()}
    measured = {name: pairs.tau_jp(setup, own).of_pairs() for name, own in taus.items()}
    values = [pair["tau_jp"] for pair in measured["Linear FT"]]
    couples = pairwise.pairs(len(setup.tasks))
    order = [couples[i] for i in np.argsort(values, kind="stable")]
    columns = [pair for pair in order if pair in wanted]
    columns = columns or at_even_ranks(order, config.columns)
    rows, cells = [], []
    for name, own in taus.items():
        cells.append([])
        for pair in columns:
            [grid] = pairwise.disentanglement_error(
                pairwise.pair_setup(setup, pair),
                [own[i] for i in pair],
                linearized=True,
                coefs=coefs,
                samples=config.grid_samples,
            )
            measures = measured[name][couples.index(pair)]
            title = f"{name}, τJp = {measures['tau_jp']:.3g}"
            cells[-1].append((title, grid))
            row = {"method": name, "pair": pairs.title(setup.titles, pair), **measures}
            rows.append(row | {"mean ξ": float(grid.mean()), "grid": grid.tolist()})
    titles = [tuple(setup.titles[i] for i in pair) for pair in columns]
    if runs.is_first():
        plots.disentanglement_of_pairs(config.out / "figure1.png", cells, coefs, titles)
    results = {"coefs": coefs.tolist(), "rows": rows}
    shown = [{k: row[k] for k in row if k != "grid"} for row in rows]
    table = {"ξ: mean over the grid.": shown}
    title = "ξ and τJp (τJp paper, Figure 1)"
    return tables.write(config.out, title, table, results, digits=3)


if __name__ == "__main__":
    script.run(Config, main)
