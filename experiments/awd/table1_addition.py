"""Tables 1, 2 and 4: merges eight image models by every method, on three CLIPs.

Xiong et al. Adaptive Weight Disentanglement. arXiv:2411.18729.

    python -m experiments.awd.table1_addition --data-dir DATA
    python -m experiments.awd.table1_addition --out runs/table2 \\
        --models openai/clip-vit-large-patch14

Table 1 is for ViT-B/32, Table 2 for ViT-L/14, Table 4 for ViT-B/16.

Data: Cars, DTD, EuroSAT, GTSRB, MNIST, RESISC45, SUN397 and SVHN; `jaxarith data check`
says which are missing.

Published, test accuracy in percent:

    ViT-B-32                SUN397  Cars  RES45  EuroSAT  SVHN  GTSRB  MNIST  DTD   mean
    Pretrained              62.3    59.7  60.7   45.5     31.4  32.6   48.5   43.8  48.0
    Individual              79.2    77.7  96.1   99.7     97.5  98.7   99.7   79.4  90.8
    Traditional MTL         73.9    74.4  93.9   98.2     95.8  98.9   99.5   77.9  88.9
    Weight Averaging        65.3    63.4  71.4   71.7     64.2  52.8   87.5   50.1  65.8
    Fisher Merging          68.6    69.2  70.7   66.4     72.9  51.1   87.9   59.9  68.3
    RegMean                 65.3    63.5  75.6   78.6     78.1  67.4   93.7   52.0  71.8
    Task Arithmetic         55.2    54.9  66.7   78.9     80.2  69.7   97.3   50.4  69.1
    Ties-Merging            59.8    58.6  70.7   79.7     86.2  72.1   98.3   54.2  72.4
    Consensus Merging       65.7    63.6  76.5   77.2     81.7  70.3   97.0   57.1  73.6
    AWD Task Arithmetic     63.5    61.9  72.6   84.9     85.1  79.1   98.1   56.7  75.2
    TW AdaMerging           58.0    53.2  68.8   85.7     81.1  84.4   92.4   44.8  71.1
    TW AdaMerging++         60.8    56.9  73.1   83.4     87.3  82.4   95.7   50.1  73.7
    LW AdaMerging           64.5    68.1  79.2   93.8     87.0  91.9   97.5   59.1  80.1
    LW AdaMerging++         66.6    68.3  82.2   94.2     89.6  89.0   98.3   60.6  81.1
    Representation Surgery  63.8    59.9  83.3   97.9     87.0  87.0   98.6   69.4  80.9
    AWD AdaMerging          68.1    71.4  83.4   94.8     87.7  93.6   97.9   66.1  82.9

    ViT-L-14                SUN397  Cars  RES45  EuroSAT  SVHN  GTSRB  MNIST  DTD   mean
    Pretrained              66.8    77.7  71.0   59.9     58.4  50.5   76.3   55.3  64.5
    Individual              82.3    92.4  97.4   100.0    98.1  99.2   99.7   84.1  94.2
    Traditional MTL         80.8    90.6  96.3   96.3     97.6  99.1   99.6   84.4  93.5
    Weight Averaging        72.1    81.6  82.6   91.9     78.2  70.7   97.1   62.8  79.6
    Fisher Merging          69.2    88.6  87.5   93.5     80.6  74.8   93.3   70.0  82.2
    RegMean                 73.3    81.8  86.1   97.0     88.0  84.2   98.5   60.8  83.7
    Task Arithmetic         73.9    82.1  86.6   94.1     87.9  86.7   98.9   65.6  84.5
    Ties-Merging            76.5    85.0  89.3   95.7     90.3  83.3   99.0   68.8  86.0
    Consensus Merging       75.0    84.3  89.4   95.6     88.3  82.4   98.9   68.0  85.2
    AWD Task Arithmetic     76.2    85.4  88.7   96.1     92.4  92.3   99.3   69.4  87.5
    LW AdaMerging           79.0    90.3  90.8   96.2     93.4  98.0   99.0   79.9  90.8
    LW AdaMerging++         79.4    90.3  91.6   97.4     93.4  97.5   99.0   79.2  91.0
    Representation Surgery  75.7    84.4  93.1   98.8     91.3  93.4   99.1   76.1  89.0
    AWD AdaMerging          79.8    90.6  91.8   97.0     93.9  98.4   99.2   81.1  91.5

    ViT-B-16                SUN397  Cars  RES45  EuroSAT  SVHN  GTSRB  MNIST  DTD   mean
    Pretrained              63.8    64.6  65.7   54.5     52.0  43.3   51.7   45.1  55.0
    Individual              81.8    86.8  96.9   99.7     97.8  99.1   99.7   82.0  92.9
    Weight Averaging        67.7    70.0  75.3   79.5     74.9  60.1   94.4   43.8  70.7
    Fisher Merging          68.5    69.9  75.2   80.4     73.2  61.2   94.5   50.7  71.7
    RegMean                 69.1    71.6  77.6   88.8     83.7  70.2   96.9   54.6  76.6
    Task Arithmetic         61.1    65.9  74.0   76.2     88.0  73.9   98.4   53.0  73.8
    Ties-Merging            69.1    72.5  80.5   84.0     85.0  71.5   98.1   54.9  77.0
    Consensus Merging       69.8    71.4  80.8   86.5     88.0  71.1   98.4   57.0  77.9
    AWD Task Arithmetic     67.8    72.7  78.7   88.5     90.9  83.6   98.9   57.1  79.8
    TW AdaMerging           64.4    64.2  75.4   86.7     86.3  86.7   97.6   46.9  76.0
    LW AdaMerging           70.2    80.7  81.6   94.8     91.6  95.8   98.5   66.2  84.9
    Representation Surgery  68.3    72.3  88.7   97.7     91.0  89.5   98.9   72.9  84.9
    AWD AdaMerging          71.5    81.9  84.3   94.6     93.3  96.8   98.6   72.6  86.7

The paper copies its baselines from other papers. Here all methods start from the same
vectors. On validation data, λ of Task Arithmetic, TIES and AWD is searched in 0.3, …,
1, λ of Consensus in 0.1, …, 1, and α of AWD in 1e-2, …, 1e-6. Fisher and RegMean use
256 validation images per task. The AdaMerging rows and Surgery use unlabelled test
images, as their papers do. TIES sums the entries of the elected sign. Surgery corrects
Task Arithmetic. The paper states neither α nor the initial coefficient (0.3 or 0.4) of
AWD AdaMerging; here α is that of AWD Task Arithmetic, and the coefficient is 0.3.

"Cosine with sum" and "effective λ" compare AWD's vector with the plain sum of the same
weights, see `experiments.awd.solving`. A second table has rows that the paper lacks,
see `experiments.awd.beyond` (`--no-beyond-paper` leaves it out): TSV-M, Iso-C, Iso-CTS,
WUDI and PCB-Merging, the plain sum of the linear weights, a search of K weights, and
AWD of vectors from other training methods.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.awd import beyond, disentangled, solving
from experiments.common import script, tables
from experiments.common.vision import fitted, options, scores, setups, vectors
from jaxarith import merge, task_vectors

PUBLISHED = {
    title: tables.published(__doc__, title) for title in options.TITLES.values()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(solving.Options, options.Models):
    tasks: tuple[str, ...] = disentangled.TASKS
    beyond_paper: bool = True
    """Also measure rows that the paper's tables lack, see above."""
    others: tuple[beyond.Other, ...] = ("linear_layers_1",)
    """Further training methods; AWD merges their vectors too. tau_jp_cyclic needs a
    control task, or --control none."""


def rows_of(setup: setups.Setup, config: Config) -> list[dict]:
    """Returns the rows of one model, in the order of the paper."""
    taus, rows = vectors.vectors(setup, "nonlinear"), []

    def add(method, accuracies, **found):
        row = {"model": setup.title, "method": method, **setup.by_task(accuracies)}
        row["mean"] = scores.means(accuracies)
        row |= {"coef": None, "alpha": None}
        rows.append(row | {"cosine with sum": None, "effective λ": None} | found)

    def add_searched(method, candidates, coefs):
        found = disentangled.searched(setup, candidates, coefs)
        add(method, found.test, coef=found.coef)
        return found

    def add_fitted(method, tau):
        add(method, scores.on_all(setup, [tau], "test", [[1.0]])[0])

    def difference(operator, **given):
        merged = operator(setup.params_0, taus, **given)
        return task_vectors.difference(merged, setup.params_0)

    pretrained, single = scores.on_own(setup, taus, "test", (0.0, 1.0))
    add("Pretrained", pretrained)
    add("Individual", single)
    add("Traditional MTL", scores.joint_accuracies(setup))
    add_fitted("Weight Averaging", difference(merge.average))
    add_fitted("Fisher Merging", fitted.fisher(setup, taus))
    add_fitted("RegMean", fitted.regmean(setup, taus))
    coefs, total = disentangled.coefs(config), task_vectors.add(taus)
    added = add_searched("Task Arithmetic", {"": total}, coefs)
    add_searched("Ties-Merging", {"": disentangled.ties(setup, taus)}, coefs)
    tenths = scores.coefs_of(config, np.linspace(0.1, 1.0, 10))
    consensus = difference(merge.consensus, coef=1.0)
    add_searched("Consensus Merging", {"": consensus}, tenths)
    sums = disentangled.sums(setup, taus, config)
    best = add_searched("AWD Task Arithmetic", sums, coefs)
    alpha = rows[-1]["alpha"] = float(best.name)
    rows[-1] |= disentangled.beside_sum(taus, sums[best.name], best.coef)
    for method, scope, density in (
        ("TW AdaMerging", "task", None),
        ("TW AdaMerging++", "task", 0.2),
        ("LW AdaMerging", "layer", None),
        ("LW AdaMerging++", "layer", 0.2),
    ):
        given = {"scope": scope, "density": density}
        add_fitted(method, fitted.adamerging(setup, taus, **given))
    add("Representation Surgery", surgery(setup, taus, total, added.coef))
    parts = disentangled.disentangled(setup.params_0, taus, config, alpha=alpha)
    add_fitted("AWD AdaMerging", fitted.adamerging(setup, parts))
    rows[-1]["alpha"] = alpha
    return rows


def surgery(setup: setups.Setup, taus, total, coef: float) -> np.ndarray:
    """Returns test accuracies of Task Arithmetic with Representation Surgery.

    Yang et al. (2024, arXiv:2402.02705). For each task a layer of width 16 learns the
    difference between the features of the merged model and of the task's own model,
    from 1000 batches of 16 unlabelled test images.
    """
    key = jax.random.key(setup.options.seed)
    steps = 2 if setup.options.smoke else 1000
    found = []
    progress = tqdm(setup.tasks, desc="surgery", unit="task")
    for number, (task, tau) in enumerate(zip(progress, taus, strict=True)):
        at = scores.outputs(setup, [total, tau], task.test, False)
        rows = np.array([[coef, 0.0], [0.0, 1.0]])
        merged, own = map(jnp.asarray, at(rows))
        module = merge.surgery(
            merged, own, key=jax.random.fold_in(key, number), steps=steps
        )
        found.append(task.test.accuracy(module(merged)))
    return np.array(found)


@script.full_precision
def main(config: Config) -> dict:
    config = options.started(config)
    rows, more, shown = [], [], {}
    control = config.beyond_paper and "tau_jp_cyclic" in config.others
    names = ("method", "mean", "coef", "alpha", "cosine with sum", "effective λ")
    for setup in setups.each(config, config.models, control=control):
        found = rows_of(setup, config)
        rows += found
        searched = [
            {name: row[name] for name in names}
            for row in found
            if row["coef"] is not None
        ]
        shown |= disentangled.shown(setup, found, PUBLISHED, keys=["method"])
        caption = f"{setup.title}: searched values."
        shown[caption] = tables.markdown(searched, digits=6)
        if config.beyond_paper:
            taus = vectors.vectors(setup, "nonlinear")
            found = beyond.rows_of(setup, taus, config, config.others)
            more += found
            shown |= beyond.shown(setup, found)
    title = "Merging image models (AWD paper, Tables 1, 2 and 4)"
    return tables.write(config.out, title, shown, {"rows": rows, "beyond": more})


if __name__ == "__main__":
    script.run(Config, main)
