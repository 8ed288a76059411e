"""Tables 8 and 15 (bases paper): merges twelve language tasks, with and without masks.

Zeng et al. Efficient Model Editing with Task Vector Bases: A Theoretical Framework and
Scalable Approach. arXiv:2502.01015: section 6.4.2, Table 8; Appendix D.1, Table 15.

    python -m experiments.bases.table8_twelve_tasks --data-dir DATA

Data: GLUE, SNLI and TREC from the Hugging Face Hub; SUBJ, CR, MPQA and MR as files of
LM-BFF's datasets.tar, unpacked in DATA; or any files, see --help.
`experiments.common.language.prompted` describes the fine-tuning of RoBERTa-base.

Published in Table 15, accuracy in percent, F1 for MRPC and QQP; in Table 8, the number
of masks, their non-zero entries in percent, and gigabytes:

    Table 15             SST-2  CR    MR    MPQA  TREC  SUBJ
    Task Arithmetic      88.5   88.2  80.3  82.9  32.0  61.0
    TIES                 88.6   88.0  85.2  83.5  22.6  48.2
    Fisher merging       90.0   89.8  83.7  75.8  26.0  54.6
    RegMean              89.7   89.7  84.7  82.6  73.0  79.1
    AdaMerging           85.0   86.1  77.8  81.5  23.0  59.5
    Consensus TA         89.2   89.4  86.6  88.2  37.6  59.6
    Consensus TIES       89.8   89.3  84.7  86.2  31.4  63.1
    Localize-and-Stitch  89.6   89.6  84.9  82.8  78.2  82.0
    Mask Sharing         90.4   89.4  84.8  76.4  89.4  90.9
    Stitch Twice         88.3   88.5  83.5  78.5  78.6  85.1

    Table 15, continued  QNLI  SNLI  MNLI  RTE   MRPC  QQP   Avg.
    Task Arithmetic      62.0  56.1  49.5  65.6  82.8  62.3  67.5
    TIES                 54.8  35.9  39.7  59.4  79.4  60.3  62.1
    Fisher merging       54.2  72.5  65.2  65.6  83.3  67.7  69.0
    RegMean              55.9  68.3  56.8  63.8  79.4  64.2  73.9
    AdaMerging           61.2  54.1  40.4  54.7  82.2  58.8  63.7
    Consensus TA         71.4  66.5  52.0  63.0  88.1  66.4  71.5
    Consensus TIES       68.9  60.4  46.1  63.0  86.2  64.4  69.5
    Localize-and-Stitch  73.4  62.1  58.0  63.3  82.0  65.1  75.9
    Mask Sharing         53.0  58.2  51.9  59.2  77.7  67.3  74.1
    Stitch Twice         54.3  74.1  62.8  67.5  81.4  74.2  76.4

    Table 8              masks  density, %  GB
    Task Arithmetic      12     100.0       3.90
    Localize-and-Stitch  12     10.9        0.42
    Mask Sharing         4      11.6        0.15
    Stitch Twice         12     7.93        0.31

All rows except the last two come from He et al. (2024). Their models differ: their code
trains with other options, and on other draws of samples.

The paper leaves the following open; our choices are:

- Methods with a coefficient search it in 0.1, 0.2, …, 1 by the mean score on validation
  samples. Fisher, RegMean and AdaMerging use unlabelled texts: Fisher and RegMean of
  the validation part, AdaMerging of the test part.
- Masks are learned from the training samples as in He et al.'s code: 10 steps at 1e7,
  starting from the 1e-5 of the entries with the largest magnitudes. The regulariser
  keeps every entry on its side (`--regularizer`), with the code's weight for language.
- The clusters are computed from the cosines of whole task vectors; there are four, as
  in the paper. The text could also mean masked vectors. --clusters 0 takes the number
  from the eigengap.
- Storage is masks x density x 4 bytes x trained parameters. RoBERTa-base has 85.1
  million of them, so 0.34 GB per model; the paper's 3.90 / 12 is 0.325.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from experiments.common import planning, script, study_merges, tables
from experiments.common.language import prompted, prompted_plan
from jaxarith import evaluate, losses, merge, sharding, task_vectors, tree
from jaxarith.data import pipeline
from jaxarith.merge.bases import cluster
from jaxarith.merge.stitch_twice import stitched_masks
from jaxarith.models import bert, heads
from jaxarith.typing import Numbers, Params, Taus, Tree

TASKS = {  # from names of the list to names in the paper's table
    **{"SST2": "SST-2", "CR": "CR", "MR": "MR", "MPQA": "MPQA", "TREC": "TREC"},
    **{"SUBJ": "SUBJ", "QNLI": "QNLI", "SNLI": "SNLI", "MNLI": "MNLI", "RTE": "RTE"},
    **{"MRPC": "MRPC", "QQP": "QQP"},
}
# He et al. report F1 where GLUE does.
POSITIVE = {"MRPC": "similar", "QQP": "duplicate"}
MEASURES = {task: prompted.f1_of(name) for task, name in POSITIVE.items()}
_FIRST, _LAST = (
    tables.published(__doc__, name) for name in ("Table 15", "Table 15, continued")
)
PUBLISHED = {method: first + _LAST[method] for method, first in _FIRST.items()}
PUBLISHED_STORAGE = tables.published(__doc__, "Table 8")
STORAGE = ("masks", "density, %", "GB")
ADAMERGING_STEPS = 500
COEFS = np.linspace(0.1, 1, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(prompted.Options):
    """Tables 8 and 15 (bases paper): merge twelve language tasks, also by masks."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """The tasks, in order: names of the paper's list (Appendix D.3), or files with
    labelled texts, NAME=FILE, NAME=TRAIN,TEST or NAME=TRAIN,VALIDATION,TEST."""
    clusters: int = 4
    """Number of clusters of task vectors; 0 takes it from the eigengap."""
    mask_epochs: int = 10
    """Number of steps that learn a mask."""
    mask_density: float = 1e-5
    """Share of the entries that an initial mask contains."""
    mask_l1: float = 1e-6
    """Weight of the mask's regulariser. Times the learning rate of 1e7 it is the 10 of
    He et al.'s code for language."""
    regularizer: Literal["official", "paper"] = "official"
    """The regulariser of the mask. official: keeps entries on their side, as in He et
    al.'s code. paper: pulls them out of the mask, as their paper prints it."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    few = min(config.clusters, 2)
    config = prompted.smoke(config, clusters=few, mask_epochs=2, mask_density=0.2)
    if not 0 <= config.clusters <= len(config.tasks):
        raise ValueError(
            f"--clusters {config.clusters}: expected 1 to {len(config.tasks)}, the "
            "number of tasks, or 0 for the number from the eigengap."
        )
    if record := planning.recorder():
        plan(config, record)
        return {}
    setup = prompted.load(config)
    check_measures(setup)
    taus = prompted.vectors(setup)
    # The merges run on one device, so the parameters move to the host.
    setup = setup._replace(params_0=sharding.to_host(setup.params_0))
    single = [
        scores(setup._replace(tasks=[task]), task_vectors.apply(setup.params_0, tau))[0]
        for task, tau in zip(setup.tasks, taus, strict=True)
    ]
    rows = [
        row(setup, "Pre-trained", scores(setup, setup.params_0)),
        row(setup, "Individual", single),
    ]
    for name, vector in searched(setup, taus).items():
        coef = search(setup, vector)
        edited = task_vectors.apply(setup.params_0, vector, coef)
        rows.append(row(setup, name, scores(setup, edited)) | {"coefficient": coef})
    for name, edited in fitted(setup, taus).items():
        rows.append(row(setup, name, scores(setup, edited)))
    own = learned_masks(setup, taus, config)
    groups = cluster(task_vectors.cosine_matrix(taus), config.clusters or None)
    for name, (edited, stored) in by_masks(setup, taus, own, groups).items():
        rows.append(row(setup, name, scores(setup, edited)) | storage(stored, taus))
    whole = {"masks": len(taus), "density, %": 100.0}
    for line in rows:
        if line["method"] == "Task Arithmetic":
            line |= whole | {"GB": len(taus) * gigabytes(taus)}
    order = ["Pre-trained", "Individual", *PUBLISHED]
    rows = sorted(rows, key=lambda line: order.index(line["method"]))
    named = [[setup.names[i] for i in members] for members in groups]
    return write(setup, {"rows": rows, "clusters": named})


def plan(config: Config, record: planning.Recorder):
    """Reports the vectors and all passes to the plan; a backward pass counts as two."""
    sizes = prompted_plan.vectors(record, config)
    # 8 rows without a search: two unmerged, three fitted, three with masks.
    searched = 4
    passes = (8 + searched) * sizes.tests + searched * len(COEFS) * sizes.training
    fisher = (1 + 2 * 4) * sizes.training  # four labels of every sample
    adamerging = 3 * 16 * ADAMERGING_STEPS * len(config.tasks)
    masks = 3 * config.mask_epochs * sizes.training
    regmean = sizes.training
    record.evaluate(sizes.full, passes + fisher + adamerging + masks + regmean)


def check_measures(setup: prompted.Setup):
    """Raises a ValueError if a task is scored by F1 and lacks the class of the F1."""
    for task in setup.tasks:
        wanted = POSITIVE.get(task.name, task.classes[0])
        if wanted not in task.classes:
            raise ValueError(
                f"{task.name} has the classes {', '.join(task.classes)}, but its score "
                f"is the F1 of {wanted}. Name a class {wanted} in --prompt."
            )


def scores(setup: prompted.Setup, params: Params, split: str = "test") -> np.ndarray:
    """Returns the scores of one model on all tasks."""
    return prompted.scores(setup, params, split, MEASURES)


def titles(setup: prompted.Setup) -> list[str]:
    """Returns the paper's names of the tasks."""
    return [TASKS.get(name, name) for name in setup.names]


def row(setup: prompted.Setup, method: str, found: Numbers) -> dict:
    """Returns a row: the scores of all tasks in percent, and their mean."""
    values = [100 * float(value) for value in (*found, np.mean(found))]
    names = [*titles(setup), "Avg."]
    return {"method": method} | dict(zip(names, values, strict=True))


# Merges without masks.


def searched(setup: prompted.Setup, taus: Taus) -> dict[str, Tree]:
    """Returns the merged vectors whose coefficient is searched."""
    params_0 = setup.params_0
    merged = {
        "TIES": merge.ties(params_0, taus, coef=1.0),
        "Consensus TA": merge.consensus(params_0, taus, coef=1.0),
        "Consensus TIES": merge.consensus(params_0, taus, coef=1.0, of="ties"),
    }
    vectors = {
        name: tree.restrict(task_vectors.difference(edited, params_0), paths(taus))
        for name, edited in merged.items()
    }
    return {"Task Arithmetic": task_vectors.add(taus), **vectors}


def paths(taus: Taus) -> list[str]:
    return list(tree.flatten(taus[0]))


def search(setup: prompted.Setup, vector: Tree) -> float:
    """Returns the coefficient with the best mean score on validation samples."""

    coefs = COEFS[::5] if setup.options.smoke else COEFS
    with tqdm(total=len(coefs), desc="coefficients") as progress:

        def scores_at(coef):
            edited = task_vectors.apply(setup.params_0, vector, coef)
            progress.update()
            return scores(setup, edited, "validation")

        return evaluate.search(scores_at, np.ones(len(setup.tasks)), coefs).coef


def with_heads(setup: prompted.Setup) -> tuple[Callable, list[dict]]:
    """Returns `logits(params, head, *inputs)`, and all heads padded to one shape.

    Heads are inputs, so all tasks share one compilation.
    """

    def logits(params, head, *inputs):
        features = setup.apply_fn(params, *inputs)
        return heads.affine_logits(head["head"], features, head["valid"])

    padded = heads.pad([task.head for task in setup.tasks])
    count = range(len(setup.tasks))
    return logits, [jax.tree.map(lambda x, i=i: x[i], padded) for i in count]


def fitted(setup: prompted.Setup, taus: Taus) -> dict[str, Params]:
    """Returns the merged models of methods that use unlabelled texts."""
    logits, own = with_heads(setup)

    def logits_of(params, *inputs):
        return logits(params["encoder"], params["head"], *inputs)

    samples = [task.validation.batches for task in setup.tasks]
    grams = study_merges.input_grams(
        setup.apply_fn,
        setup.params_0,
        taus,
        samples,
        inputs=prompted.INPUTS,
        token_mask="attention_mask",
        select=bert.BLOCK_LINEAR_WEIGHTS,
    )
    return {
        "Fisher merging": study_merges.fisher(
            logits_of,
            setup.params_0,
            taus,
            own,
            samples,
            key=jax.random.key(setup.options.seed),
            inputs=prompted.INPUTS,
        ),
        "RegMean": merge.regmean(setup.params_0, taus, grams),
        "AdaMerging": study_merges.adamerging(
            logits_of,
            setup.params_0,
            taus,
            own,
            [task.test.batches for task in setup.tasks],
            inputs=prompted.INPUTS,
            steps=2 if setup.options.smoke else ADAMERGING_STEPS,
        ),
    }


# Merges with masks.


def learned_masks(setup: prompted.Setup, taus: Taus, config: Config) -> list[Tree]:
    """Learns the mask of every task from its training samples."""
    logits, own = with_heads(setup)

    def loss(params, batch):
        inputs = (batch[name] for name in prompted.INPUTS)
        scores = logits(params, batch, *inputs)
        return losses.cross_entropy(scores, batch["label"], batch["mask"])

    found = []
    progress = tqdm(setup.tasks, desc="masks", unit="task")
    for task, head, tau in zip(progress, own, taus, strict=True):
        # Batches of 8 texts, as in He et al.'s code for language.
        batches = pipeline.evaluation_batches(task.train, 8)
        mask = merge.localize(
            loss,
            setup.params_0,
            tau,
            [batch | head for batch in batches],
            density=config.mask_density,
            epochs=config.mask_epochs,
            l1=config.mask_l1,
            regularizer=config.regularizer,
        )
        found.append(jax.device_get(mask))
    return found


def by_masks(
    setup: prompted.Setup,
    taus: Taus,
    own: Sequence[Tree],
    groups: Sequence[Sequence[int]],
) -> dict[str, tuple[Tree, list[Tree]]]:
    """Returns merged models, with the masks that each of them stores."""
    shared = merge.mask_sharing(own, groups)
    stitch = merge.localize_and_stitch
    return {
        "Localize-and-Stitch": (stitch(setup.params_0, taus, masks=own), list(own)),
        "Mask Sharing": (
            stitch(setup.params_0, taus, masks=shared),
            [shared[members[0]] for members in groups],
        ),
        "Stitch Twice": (
            merge.stitch_twice(setup.params_0, taus, masks=own, clusters=groups),
            stitched_masks(own, groups),
        ),
    }


def storage(masks: Sequence[Tree], taus: Taus) -> dict:
    """Returns the number of masks, their mean density in percent, and their GB."""
    density = float(np.mean([share(mask) for mask in masks]))
    taken = len(masks) * density * gigabytes(taus)
    return {"masks": len(masks), "density, %": 100 * density, "GB": taken}


def share(mask: Tree) -> float:
    """Returns the share of a mask's entries that are True."""
    leaves = list(tree.flatten(mask).values())
    return sum(int(np.sum(x)) for x in leaves) / sum(np.size(x) for x in leaves)


def gigabytes(taus: Taus) -> float:
    """Returns the GB of one model's trained parameters in float32."""
    return 4e-9 * tree.size(taus[0])


def write(setup: prompted.Setup, results: dict) -> dict:
    columns = [*titles(setup), "Avg."]
    half = -(-len(columns) // 2)
    # The paper's mean is shown only for the paper's tasks.
    mean = "Avg." if setup.names == list(TASKS) else None
    theirs = {
        method: dict(zip((*TASKS.values(), mean), values, strict=True))
        for method, values in PUBLISHED.items()
    }

    def table(chosen):
        published = {
            method: [values.get(name) for name in chosen]
            for method, values in theirs.items()
        }
        rows = results["rows"]
        beside = tables.beside(rows, published, keys=["method"], values=chosen)
        return tables.markdown(beside)

    stored = [line for line in results["rows"] if "masks" in line]
    both = tables.beside(stored, PUBLISHED_STORAGE, keys=["method"], values=STORAGE)
    captions = {
        "Table 15: accuracy in percent; F1 for MRPC and QQP.": table(columns[:half]),
        "Table 15, the other columns.": table(columns[half:]),
        "Table 8: storage of masks and models.": tables.markdown(both, digits=3),
    }
    clusters = "; ".join(", ".join(members) for members in results["clusters"])
    note = (
        f"Clusters: {clusters}. GB: masks x density x {gigabytes_text(setup)} GB of "
        "trained parameters in float32. All published rows except the last two come "
        "from He et al. (2024)."
    )
    title = "Twelve language tasks (bases, Tables 8 and 15)"
    return tables.write(setup.options.out, title, captions, results, note)


def gigabytes_text(setup: prompted.Setup) -> str:
    """Returns the GB of the trained parameters as text."""
    return f"{gigabytes([tree.select(setup.params_0, bert.BLOCKS)]):.3g}"


if __name__ == "__main__":
    script.run(Config, main)
