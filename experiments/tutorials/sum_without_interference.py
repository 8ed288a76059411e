# %% [markdown]
# # From a CLIP to a sum that does not interfere
#
# A *task vector* is what fine-tuning added to a model: the new weights minus the old
# ones. If task vectors did not disturb each other, one could simply add them, and the
# sum would do every task. Here we fine-tune a tiny CLIP on three image tasks in three
# ways, add the three vectors of each way, and look at what the sum can do.
#
# Needs `pip install -e '.[demo]'`, which has the images. Nothing is downloaded.

# %%
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.common.vision import small_tasks
from jaxarith import evaluate, losses, plots, train, tree
from jaxarith.data import images, pipeline
from jaxarith.models import clip, heads

OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# The model is a function of its parameters: `encode(params, images) -> features`. We
# train the image encoder alone. The text encoder makes one fixed *head* for each task:
# the features of texts such as "a photo of the digit 7".

# %%
model = clip.load(clip.TINY_CLIP)
encode = clip.image_encoder(model.config)
params_0 = tree.select(model.params, clip.IMAGE_ENCODER)

names = ["uci_digits", "capital_letters", "inverted_digits"]
preprocess = images.Preprocessing.from_folder(model.folder)
tasks = [small_tasks.load(name, preprocess, limit=400) for name in names]
head_of = [clip.zero_shot_head(model, task.classes, task.templates) for task in tasks]
tests = [pipeline.evaluation_batches(task.test, 128) for task in tasks]
print(f"{tree.size(params_0):,} parameters, {len(tasks[0].train)} images a task")

# %% [markdown]
# Now three trainings, which differ in two options only:
#
# - **ordinary**: the network itself is trained;
# - **linearised**: its first-order Taylor expansion around the pre-trained weights is
#   trained in place of the network;
# - **cyclic τJp**: linearised, and each task sees a few images of another task, on
#   which its vector is asked to change nothing. The change, ‖J(x)τ‖, is called τJp.


# %%
def loss_fn(features, batch, head):
    logits = heads.logits(head["head"], features, head["valid"])
    return losses.cross_entropy(logits, batch["label"])


def fine_tuned(**options):
    """One task vector for each task."""
    options |= {"steps": 40, "batch_size": 32, "learning_rate": 1e-3}
    config = train.TrainConfig(penalty_batch_size=8, **options)
    batches = train.task_batches([task.train for task in tasks], config, names=names)
    own = {"names": names, "constants": heads.pad(head_of)}
    return train.fine_tune(encode, params_0, loss_fn, batches, config, **own)


taus = {"ordinary": fine_tuned(), "linearised": fine_tuned(linearized=True)}
taus["cyclic τJp"] = fine_tuned(linearized=True, penalty="cyclic")

# %% [markdown]
# `evaluate.forward` runs a network, and `evaluate.tangent` a linearised model, at any
# coefficients of the task vectors. The second passes once over the images.


# %%
def predicted(task, features):
    return np.asarray(heads.logits(head_of[task], jnp.asarray(features)).argmax(-1))


def accuracies(way, coefs):
    """Accuracy on every task, with one coefficient for each task vector."""
    return [
        np.mean(predicted(task, outputs[way][task](coefs)) == evaluate.labels(batches))
        for task, batches in enumerate(tests)
    ]


outputs = {}
for way, vectors in taus.items():
    run = evaluate.forward if way == "ordinary" else evaluate.tangent
    outputs[way] = [run(encode, params_0, vectors, batches) for batches in tests]
print(f"pre-trained  {np.mean(accuracies('ordinary', [0, 0, 0])):.3f}")
for way in taus:
    alone = [accuracies(way, own)[task] for task, own in enumerate(np.eye(3))]
    summed = accuracies(way, [1, 1, 1])
    print(f"{way:12} own vector {np.mean(alone):.3f}   sum {np.mean(summed):.3f}")

# %% [markdown]
# Alone, the vectors of all three ways do their tasks equally well. But the sum of the
# ordinary vectors is worse than no training at all. The sum of the τJp vectors does
# nearly what each does alone, at coefficient 1: nothing had to be searched.
#
# Where does the loss come from? The picture shows ξ for two of the tasks: the share of
# answers that change because the *other* vector was added. White: none. Box: 0 to 1.

# %%
pair, coefs, maps = (0, 2), np.linspace(-2, 2, 11), {}
answers = [functools.partial(predicted, i) for i in pair]
for way in ("linearised", "cyclic τJp"):
    run = [lambda c, at=outputs[way][i]: at([c[0], 0, c[1]]) for i in pair]
    maps[way] = evaluate.disentanglement_error(run, answers, coefs)
    print(f"{way:12} mean ξ {maps[way].mean():.3f}")
plots.disentanglement(OUT / "interference.png", maps, coefs, (names[0], names[2]))

# %% [markdown]
# ## Where to go next
#
# - `statistics_instead_of_data.py`: the same without images of the other tasks.
# - `python -m experiments.quickstart --out runs/quickstart`: six tasks, ten merges.
