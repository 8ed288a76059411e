# %% [markdown]
# # Merge in your own JAX code
#
# A merge is a function `merge.method(params_0, taus, ...) -> params`. It takes any tree
# of arrays: the state of a Flax NNX model, an Equinox module, a nested dict. Your
# training loop stays as it is. Needs `pip install -e . equinox`, and no extra.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxarith import merge, task_vectors

# %% [markdown]
# A toy with a real conflict: points around three places in the plane, a task for each
# place. The pre-trained model tells left from right of every place. Each task tilts
# that border, by an angle of its own.


# %%
def points(task, angle, seed, count=400):
    """Inputs `[N, 2]` around the place of a task, and labels `[N]`, 0 or 1."""
    place = np.array([[-4.0, 0], [0, 4], [4, 0]])[task]
    offset = np.random.default_rng([task, seed]).normal(size=(count, 2))
    turn = np.radians(angle)
    return place + offset, 1 * (offset @ [np.cos(turn), np.sin(turn)] > 0)


angles = dict(enumerate((60, 120, -60)))
starts = [points(task, angle=0, seed=0) for task in angles]
before = [np.concatenate(column) for column in zip(*starts, strict=True)]
train, test = ([points(*one, seed=s) for one in angles.items()] for s in (1, 2))


def fitted(apply, params, data, steps):
    """Your own training loop: any `apply(params, x) -> logits`, any `params`."""
    optimizer, (x, y) = optax.adam(3e-3), data

    def loss(params):
        logits = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    fit = jax.jit(lambda *start: jax.lax.scan(step, start, length=steps)[0][0])
    return fit(params, optimizer.init(params))


def show(name, apply, params):
    """Prints the accuracy on test points of every task, and the mean."""
    found = [float(jnp.mean(apply(params, x).argmax(-1) == y)) for x, y in test]
    print(name.ljust(24), *(f"{value:7.3f}" for value in (*found, np.mean(found))))


# %% [markdown]
# ## Flax NNX
#
# `nnx.split` gives the parameters as a state, and `nnx.merge` puts them back.

# %%
rngs = nnx.Rngs(0)
first, second = nnx.Linear(2, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
last = nnx.Linear(32, 2, rngs=rngs)
net = nnx.Sequential(first, nnx.relu, second, nnx.relu, last)
graph, fresh = nnx.split(net, nnx.Param)
apply = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
params_0 = fitted(apply, fresh, before, steps=400)
tuned = [fitted(apply, params_0, data, steps=150) for data in train]

# Three lines are all that a merge takes.
taus = [task_vectors.difference(params, params_0) for params in tuned]
merged = merge.task_arithmetic(params_0, taus, coef=0.6)
model = nnx.merge(graph, merged)
print("cosines:", np.asarray(task_vectors.cosine_matrix(taus)).round(2).tolist())

# %% [markdown]
# The columns are the three tasks and their mean. A model that was fine-tuned on one
# task is wrong at the other places. Which merge and coefficient are the best, one has
# to try. Coefficients may depend on the path: below, more is added to the last layer.

# %%
show("pre-trained", apply, params_0)
for task, params in enumerate(tuned):
    show(f"fine-tuned on task {task}", apply, params)
for method in (merge.task_arithmetic, merge.average, merge.ties, merge.tsv):
    show(method.__name__, apply, method(params_0, taus))
show("task_arithmetic, at 0.6", apply, merged)
by_layer = merge.task_arithmetic(
    params_0, taus, coef=lambda path: 1.0 if path.startswith("layers/4") else 0.6
)
show("task_arithmetic, layers", apply, by_layer)

# %% [markdown]
# ## Equinox
#
# `eqx.partition` takes the arrays, which merges see, apart from all else.

# %%
module = eqx.nn.MLP(2, 2, 32, depth=2, key=jax.random.key(0))
arrays, static = eqx.partition(module, eqx.is_inexact_array)
apply = jax.jit(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
params_0 = fitted(apply, arrays, before, steps=400)
tuned = [fitted(apply, params_0, data, steps=150) for data in train]
taus = [task_vectors.difference(params, params_0) for params in tuned]
merged = jax.jit(merge.task_arithmetic)(params_0, taus, coef=0.6)
show("Equinox: sum at 0.6", apply, merged)

# %% [markdown]
# ## Where to go next
#
# - `merge.METHODS` lists all merges, with their papers, costs and ranges of search.
# - Real images and a sum that needs no search: `sum_without_interference.py`.
# - Checkpoints in files, without any training code: `merge_folders.py`.
