# %% [markdown]
# # What a JVP costs on your machine
#
# Training in the tangent space needs Jacobian-vector products, J(x)τ. Are they dear?
# This tutorial counts and measures on the machine it runs on: a forward pass, a
# gradient, one tangent, and many tangents that share one linearisation.
#
# Needs `pip install -e '.[demo]'` for the picture; the CLIP is part of the library.

# %%
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxarith import plots, tangent, task_vectors, tree
from jaxarith.models import clip

OUT = Path("runs/tutorials")
OUT.mkdir(parents=True, exist_ok=True)

model = clip.load(clip.TINY_CLIP)
encode = clip.image_encoder(model.config)
params_0 = tree.select(model.params, clip.IMAGE_ENCODER)
images = jax.random.normal(jax.random.key(0), (16, 28, 28, 3))
taus = [jax.tree.map(lambda leaf: 0.01 * leaf, params_0)] * 4
platform = jax.devices()[0].platform
print(f"{platform}, {tree.size(params_0):,} parameters, {len(images)} images")

# %% [markdown]
# Every row is one compiled program. XLA counts its floating-point operations (FLOPs),
# and we take the shortest time of 20 calls. Counts do not depend on how busy the
# machine is; times do.


# %%
def measured(function, *args):
    """FLOPs of a program, and its shortest time in seconds."""
    program, seconds = jax.jit(function).lower(*args).compile(), []
    for _ in range(20):
        since = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - since)
    return (program.cost_analysis() or {})["flops"], min(seconds)


def step(apply):
    return jax.grad(lambda params, x: jnp.mean(jnp.square(apply(params, x))))


def moved(tau, x):
    return tangent.jvp(encode, params_0, tau, x)[1]


linearised, tuned = tangent.linearize(encode, params_0), task_vectors.apply
attention = tree.select(taus[0], r".*/self_attn/.*")
rows = {
    "forward pass": measured(encode, params_0, images),
    "one tangent": measured(moved, taus[0], images),
    "one tangent, attention alone": measured(moved, attention, images),
    "ordinary step": measured(step(encode), tuned(params_0, taus[0]), images),
    "linearised step": measured(step(linearised), tuned(params_0, taus[0]), images),
}
flops, seconds = rows["forward pass"]
print(f"{'':30} FLOPs    seconds   over a forward pass: FLOPs, seconds")
for name, (count, spent) in rows.items():
    ratios = f"{count / flops:10.2f} {spent / seconds:8.2f}"
    print(f"{name:30} {count:.2e} {spent:7.4f}   {ratios}")

# %% [markdown]
# Counting matrix products, a tangent alone costs 2 forward passes beside the one that
# it needs, so 3. An ordinary step costs 3 as well, and a linearised step 5: training in
# the tangent space has 5 / 3 the price of ordinary training.
#
# A vector of the attention weights alone has fewer products. `jvp` takes what a task
# vector lacks as constant, so frozen leaves cost no tangent.
#
# **Many tangents.** A search over coefficients, a ξ map or a τJp matrix needs J(x)τ of
# every task vector. `tangent.jvps` linearises once: T tangents cost 1 + 2T forward
# passes. With one program for each, they cost 3T. The outputs at any coefficients are
# sums of these, and cost no pass at all.


# %%
def together(taus, x):
    return tangent.jvps(encode, params_0, taus, x)[1]


found = [rows["one tangent"]]
found += [measured(together, taus[:n], images) for n in (2, 4)]
numbers = [1, 2, 4]
alone = rows["one tangent"][1] / seconds
lines = {
    "jvps, measured": (numbers, [spent / seconds for _, spent in found]),
    "jvp for each, measured": (numbers, [alone * n for n in numbers]),
    "1 + 2 T": (numbers, [1 + 2 * n for n in numbers]),
    "3 T": (numbers, [3 * n for n in numbers]),
}
for number, (count, spent) in zip(numbers, found, strict=True):
    print(f"T = {number}: {count / flops:.1f} counted, {spent / seconds:.1f} measured")
x, y = "task vectors T", "time over one forward pass"
plots.curves(OUT / "tangents.png", lines, x=x, y=y, best=False)

# %% [markdown]
# ## Where to go next
#
# - `python -m experiments.bench.jvp_cost --out runs/jvp_cost`: ViT-B/32 and more rows,
#   beside PyTorch.
# - `tangent.linearize(..., product_dtype="bfloat16")` rounds tangent products alone.
# - What the tangent space is good for: `sum_without_interference.py`.
