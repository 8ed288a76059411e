"""Tables 6 and 7: AWD makes vectors more orthogonal, its reverse less orthogonal.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729: Appendix 8.2.

    python -m experiments.awd.table6_reversed --data-dir DATA

Data: the same as for `table1_addition`. Its task vectors in the bank are used.

Published, test accuracy in percent:

    ViT-B-32, as trained  SUN397  Cars  RES45  Euro  SVHN  GTSRB  MNIST  DTD   mean
    Pretrained            62.3    59.7  60.7   45.5  31.4  32.6   48.5   43.8  48.0
    Individual            79.2    77.7  96.1   99.7  97.5  98.7   99.7   79.4  90.8
    Task Arithmetic       55.2    54.9  66.7   78.9  80.2  69.7   97.3   50.4  69.1

    ViT-B-32, increased       SUN397  Cars  RES45  Euro  SVHN  GTSRB  MNIST  DTD   mean
    Individual Reconstructed  79.3    77.6  96.1   99.8  97.4  98.8   99.7   78.8  90.9
    AWD Task Arithmetic       63.5    61.9  72.6   84.9  85.1  79.1   98.1   56.7  75.2

    ViT-B-32, decreased       SUN397  Cars  RES45  Euro  SVHN  GTSRB  MNIST  DTD   mean
    Individual Reconstructed  78.3    76.6  95.6   99.6  97.4  98.8   99.7   78.6  90.6
    AWD Task Arithmetic       2.7     1.1   19.3   42.1  60.1  20.1   92.6   16.7  31.8

    ViT-L-14, as trained  SUN397  Cars  RES45  Euro   SVHN  GTSRB  MNIST  DTD   mean
    Pretrained            66.8    77.7  71.0   59.9   58.4  50.5   76.3   55.3  64.5
    Individual            82.3    92.4  97.4   100.0  98.1  99.2   99.7   84.1  94.2
    Task Arithmetic       73.9    82.1  86.6   94.1   87.9  86.7   98.9   65.6  84.5

    ViT-L-14, increased       SUN397  Cars  RES45  Euro  SVHN  GTSRB  MNIST  DTD   mean
    Individual Reconstructed  84.8    92.4  97.3   99.7  98.1  99.3   99.7   84.3  94.4
    AWD Task Arithmetic       76.2    85.4  88.7   96.1  92.4  92.3   99.3   69.4  87.5

    ViT-L-14, decreased       SUN397  Cars  RES45  Euro  SVHN  GTSRB  MNIST  DTD   mean
    Individual Reconstructed  84.6    92.3  97.4   99.7  98.2  99.3   99.7   84.4  94.4
    AWD Task Arithmetic       36.0    31.5  48.5   54.9  83.2  54.3   97.6   37.9  55.5

A reconstructed model is θ0 + (τ_i - δ). About the reverse the paper only says that the
vectors "can still recover the performance of the original" ones. Here its α is the one
of 1e-2, …, 1e-6 with the best reconstructed models on validation data. Its λ is that of
AWD, so only the objective differs.
"""

import dataclasses

from tqdm import tqdm

from experiments.awd import disentangled, solving
from experiments.common import script, tables
from experiments.common.vision import options, scores, setups, vectors
from jaxarith import task_vectors

OURS, REVERSED = "increased orthogonality", "decreased orthogonality"
PUBLISHED = {
    title: {
        (objective, method): values
        for objective, part in (
            ("", "as trained"),
            (OURS, "increased"),
            (REVERSED, "decreased"),
        )
        for method, values in tables.published(__doc__, f"{title}, {part}").items()
    }
    for title in ("ViT-B-32", "ViT-L-14")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, options.Models):
    models: tuple[str, ...] = (options.B32, options.L14)
    tasks: tuple[str, ...] = disentangled.TASKS


def rows_of(setup: setups.Setup, how: solving.Options) -> list[dict]:
    """Returns the rows of one model, in the order of the paper."""
    taus, rows = vectors.vectors(setup, "nonlinear"), []
    alphas = disentangled.alphas(setup.options)
    coefs = disentangled.coefs(setup.options)

    def add(objective, method, accuracies, parts=None, **found):
        row = {"model": setup.title, "objective": objective, "method": method}
        row |= setup.by_task(accuracies) | {"mean": scores.means(accuracies)}
        row["cosine"] = None if parts is None else disentangled.mean_cosine(parts)
        row |= {"coef": None, "alpha": None}
        rows.append(row | {"cosine with sum": None, "effective λ": None} | found)

    # One α at a time: the vectors for all α would not fit into memory.
    def vectors_at(alpha, objective):
        given = {"alpha": alpha, "objective": objective}
        return disentangled.disentangled(setup.params_0, taus, how, **given)

    zero_shot, single = scores.on_own(setup, taus, "test", (0.0, 1.0))
    add("", "Pretrained", zero_shot)
    add("", "Individual", single, disentangled.linear_weights(taus))
    total = {"": task_vectors.add(taus)}
    found = disentangled.searched(setup, total, coefs)
    add("", "Task Arithmetic", found.test, coef=found.coef)

    found = disentangled.searched(setup, disentangled.sums(setup, taus, how), coefs)
    alpha = float(found.name)
    own = vectors_at(alpha, "reduce")
    single = scores.on_own(setup, own, "test")[0]
    add(OURS, "Individual Reconstructed", single, own, alpha=alpha)
    given = {"coef": found.coef, "alpha": alpha}
    given |= disentangled.beside_sum(taus, task_vectors.add(own), found.coef)
    add(OURS, "AWD Task Arithmetic", found.test, **given)

    kept = {
        alpha: scores.on_own(setup, vectors_at(alpha, "reverse"), "validation").mean()
        for alpha in tqdm(alphas, desc="AWD, reversed", unit="α")
    }
    alpha = max(kept, key=kept.__getitem__)  # if equal, the first (largest) α
    own = vectors_at(alpha, "reverse")
    single = scores.on_own(setup, own, "test")[0]
    add(REVERSED, "Individual Reconstructed", single, own, alpha=alpha)
    total, coef = task_vectors.add(own), found.coef
    merged = scores.on_all(setup, [total], "test", [[coef]])[0]
    given = {"coef": coef, "alpha": alpha}
    given |= disentangled.beside_sum(taus, total, coef)
    add(REVERSED, "AWD Task Arithmetic", merged, **given)
    return rows


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows, shown = [], {}
    for setup in setups.each(config, config.models, control=False):
        found = rows_of(setup, config)
        rows += found
        keys = ["objective", "method"]
        shown |= disentangled.shown(setup, found, PUBLISHED, keys=keys)
        names = ("objective", "method", "cosine", "coef", "alpha")
        names += ("cosine with sum", "effective λ")
        caption = f"{setup.title}: mean |cosine| of different vectors, λ and α."
        chosen = [{name: row[name] for name in names} for row in found]
        shown[caption] = tables.markdown(chosen, digits=6)
    title = "More and less orthogonal vectors (AWD paper, Tables 6 and 7)"
    return tables.write(config.out, title, shown, {"rows": rows})


if __name__ == "__main__":
    script.run(Config, main)
