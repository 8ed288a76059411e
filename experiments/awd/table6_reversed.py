"""Tables 6 and 7: vectors made more orthogonal by AWD, and less by its reverse.

Xiong et al. Multi-Task Model Merging via Adaptive Weight Disentanglement.
arXiv:2411.18729: Appendix 8.2.

    python -m experiments.awd.table6_reversed --data-dir DATA
    python -m experiments.awd.table6_reversed --smoke --out runs/smoke

Data: those of `table1_addition`, whose task vectors are taken from the bank.

Published, mean test accuracy in percent (each row by task in `PUBLISHED`):

                                                  ViT-B-32    ViT-L-14
    Pretrained                                    48.0        64.5
    Individual                                    90.8        94.2
    Task Arithmetic                               69.1        84.5
    increased  Individual Reconstructed           90.9        94.4
               AWD Task Arithmetic                75.2        87.5
    decreased  Individual Reconstructed           90.6        94.4
               AWD Task Arithmetic                31.8        55.5

A reconstructed model is θ0 + (τ_i - δ). The paper says of the reverse only that the
vectors "can still recover the performance of the original" ones. Here its α is that of
1e-2, …, 1e-6 with the best reconstructed models on validation data, and its λ is that
of AWD, so that the objective is all that differs.

Not run at full scale yet.
"""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from experiments.awd import disentangled, table1_addition
from experiments.common import script, tables
from experiments.common.vision import options, vectors
from jaxarith import task_vectors

OURS, REVERSED = "increased orthogonality", "decreased orthogonality"
# By the objective and the method; the first three are those of Tables 1 and 2.
PUBLISHED = {
    "ViT-B-32": {
        (OURS, "Individual Reconstructed"): [79.3, 77.6, 96.1, 99.8, 97.4, 98.8]
        + [99.7, 78.8, 90.9],
        (OURS, "AWD Task Arithmetic"): [63.5, 61.9, 72.6, 84.9, 85.1, 79.1, 98.1]
        + [56.7, 75.2],
        (REVERSED, "Individual Reconstructed"): [78.3, 76.6, 95.6, 99.6, 97.4, 98.8]
        + [99.7, 78.6, 90.6],
        (REVERSED, "AWD Task Arithmetic"): [2.7, 1.1, 19.3, 42.1, 60.1, 20.1, 92.6]
        + [16.7, 31.8],
    },
    "ViT-L-14": {
        (OURS, "Individual Reconstructed"): [84.8, 92.4, 97.3, 99.7, 98.1, 99.3]
        + [99.7, 84.3, 94.4],
        (OURS, "AWD Task Arithmetic"): [76.2, 85.4, 88.7, 96.1, 92.4, 92.3, 99.3]
        + [69.4, 87.5],
        (REVERSED, "Individual Reconstructed"): [84.6, 92.3, 97.4, 99.7, 98.2, 99.3]
        + [99.7, 84.4, 94.4],
        (REVERSED, "AWD Task Arithmetic"): [36.0, 31.5, 48.5, 54.9, 83.2, 54.3, 97.6]
        + [37.9, 55.5],
    },
}
for _model, _rows in PUBLISHED.items():
    _rows |= {
        ("", method): table1_addition.PUBLISHED[_model][method]
        for method in ("Pretrained", "Individual", "Task Arithmetic")
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Models):
    """Vectors made more orthogonal, and less; of ViT-B/32 and ViT-L/14."""

    out: Path = Path("runs/awd/table6")
    """Folder for report.json and report.md."""
    models: tuple[str, ...] = (options.B32, options.L14)
    """CLIPs: folders, or ids of the Hugging Face Hub."""
    tasks: tuple[str, ...] = table1_addition.ORDER
    """The tasks, in order: names of jaxarith data check, or NAME=FOLDER with images in
    FOLDER/<split>/<class>/."""


def rows_of(setup: options.Setup) -> list[dict]:
    """The rows of one model, in the order of the paper."""
    taus, rows = vectors.vectors(setup, "nonlinear"), []
    alphas = disentangled.alphas(setup.options)
    coefs = disentangled.coefs(setup.options)

    def add(objective, method, accuracies, parts=None, **found):
        per_task = {
            name: 100 * float(value)
            for name, value in zip(setup.names, accuracies, strict=True)
        }
        row = {"model": setup.title, "objective": objective, "method": method}
        row |= per_task | {"mean": options.means(accuracies)}
        row["cosine"] = None if parts is None else disentangled.mean_cosine(parts)
        rows.append(row | {"coef": None, "alpha": None} | found)

    # Those of one α at a time: of all α they would not fit into memory.
    def vectors_at(alpha, objective):
        return disentangled.disentangled(setup, taus, alpha=alpha, objective=objective)

    zero_shot, single = disentangled.own_accuracies(setup, taus, "test", (0.0, 1.0))
    add("", "Pretrained", zero_shot)
    add("", "Individual", single, disentangled.linear_weights(taus))
    total = {"": task_vectors.add(taus)}
    found = disentangled.searched(setup, total, coefs)
    add("", "Task Arithmetic", found.test, coef=found.coef)

    sums = {
        f"{alpha:g}": task_vectors.add(vectors_at(alpha, "reduce"))
        for alpha in tqdm(alphas, desc="AWD", unit="α")
    }
    found = disentangled.searched(setup, sums, coefs)
    alpha = float(found.name)
    own = vectors_at(alpha, "reduce")
    single = disentangled.own_accuracies(setup, own, "test")[0]
    add(OURS, "Individual Reconstructed", single, own, alpha=alpha)
    given = {"coef": found.coef, "alpha": alpha}
    add(OURS, "AWD Task Arithmetic", found.test, **given)

    kept = {
        alpha: disentangled.own_accuracies(
            setup, vectors_at(alpha, "reverse"), "validation"
        ).mean()
        for alpha in tqdm(alphas, desc="AWD, reversed", unit="α")
    }
    alpha = max(kept, key=kept.get)  # of equals the first, the largest α
    own = vectors_at(alpha, "reverse")
    single = disentangled.own_accuracies(setup, own, "test")[0]
    add(REVERSED, "Individual Reconstructed", single, own, alpha=alpha)
    total, coef = task_vectors.add(own), found.coef
    merged = disentangled.on_all(setup, [total], "test", [[coef]])[0]
    add(REVERSED, "AWD Task Arithmetic", merged, coef=coef, alpha=alpha)
    return rows


@script.full_precision
def main(config: Config) -> dict:
    """Runs the tables; returns what `report.json` holds."""
    config = options.started(config)
    rows, shown = [], {}
    for setup in options.setups(config, config.models, control=False):
        found = rows_of(setup)
        rows += found
        beside = tables.beside(
            found,
            disentangled.published(setup, PUBLISHED, table1_addition.ORDER),
            keys=["objective", "method"],
            values=[*setup.names, "mean"],
        )
        caption = f"{setup.title}: test accuracy, percent."
        shown[caption] = tables.markdown(beside)
        names = ("objective", "method", "cosine", "coef", "alpha")
        caption = f"{setup.title}: mean |cosine| of different vectors, λ and α."
        chosen = [{name: row[name] for name in names} for row in found]
        shown[caption] = tables.markdown(chosen, digits=6)
    results = {"rows": rows}
    title = "More and less orthogonal vectors (AWD paper, Tables 6 and 7)"
    return tables.write(config.out, title, shown, results)


if __name__ == "__main__":
    script.run(Config, main)
