# %% [markdown]
# # Merge LoRA adapters, and a Llama-shaped pair from YAML
#
# `jaxarith merge` merges checkpoints in folders, of any architecture: it reads
# safetensors and never builds a model. This tutorial makes small folders with the names
# and the configuration of a Llama. Their weights are random, so nothing here can talk;
# what you see is what moves where. Needs `pip install -e '.[demo]'` for a picture.

# %%
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxarith import cli, plots

OUT = Path("runs/tutorials/folders")
OUT.mkdir(parents=True, exist_ok=True)
WIDTH, LAYERS, WEIGHTS, ADAPTER = (
    32,
    8,
    "model.safetensors",
    "adapter_model.safetensors",
)
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.up_proj"]
NAMES = [f"model.layers.{i}.{p}.weight" for i in range(LAYERS) for p in PROJECTIONS]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CONFIG |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}


def jaxarith(*words):
    print("\n$ jaxarith", *words)
    assert cli.main([str(word) for word in words]) == 0


def normal(seed, names, shape=(WIDTH, WIDTH)):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(scale=0.1, size=shape).astype(np.float32) for n in names}


def written(name, tensors, file, config):
    (OUT / name).mkdir(exist_ok=True)
    save_file(tensors, OUT / name / file, {"format": "pt"})
    kind = "adapter_config.json" if file == ADAPTER else "config.json"
    (OUT / name / kind).write_text(json.dumps(config))
    return OUT / name


# %% [markdown]
# ## From YAML
#
# A base, and two models "fine-tuned" from it. A file of mergekit runs as it is. The
# lists are *gradients*: the weight of `math` rises from the first layer to the last.

# %%
base = normal(0, NAMES)
BASE = written("base", base, WEIGHTS, CONFIG)
changes = {name: normal(seed, NAMES) for seed, name in enumerate(("math", "code"), 1)}
for name, change in changes.items():
    written(name, {n: base[n] + 0.1 * change[n] for n in NAMES}, WEIGHTS, CONFIG)
MATH, CODE = (OUT / name for name in changes)
(OUT / "recipe.yaml").write_text(f"""\
merge_method: task_arithmetic
base_model: {BASE}
models:
  - {{model: {MATH}, parameters: {{weight: [0.0, 1.0]}}}}
  - {{model: {CODE}, parameters: {{weight: [1.0, 0.0]}}}}
dtype: float32
""")
jaxarith("recipe", "check", OUT / "recipe.yaml")
jaxarith("merge", OUT / "recipe.yaml", OUT / "merged", "--overwrite")

# %% [markdown]
# Did it? The picture has, by layer, each model's share in the merge (least squares).

# %%
merged = load_file(OUT / "merged" / WEIGHTS)
trees = [*changes.values(), {n: 10 * (merged[n] - base[n]) for n in NAMES}]
shares = []
for i in range(LAYERS):
    own = [name for name in NAMES if f".layers.{i}." in name]
    *each, moved = (np.concatenate([t[n].ravel() for n in own]) for t in trees)
    shares.append(np.linalg.lstsq(np.stack(each, 1), moved, rcond=None)[0])
print(np.round(shares, 3).T)
lines = {n: (range(LAYERS), np.array(shares)[:, i]) for i, n in enumerate(changes)}
plots.curves(OUT / "gradients.png", lines, x="layer", y="share", best=False)

# %% [markdown]
# ## LoRA adapters
#
# `--to-adapter` merges PEFT's adapters to one, here by TIES, without the base.

# %%
lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
lora |= {"target_modules": ["q_proj"], "base_model_name_or_path": str(BASE)}
modules = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
both = []
for seed in (3, 4):
    factors = normal(seed, [f"{m}.lora_A.weight" for m in modules], (4, WIDTH))
    factors |= normal(seed + 9, [f"{m}.lora_B.weight" for m in modules], (WIDTH, 4))
    both += ["--model", written(f"lora_{seed}", factors, ADAPTER, lora)]
ties = ["--method", "ties", "--overwrite", "--out", OUT / "lora_ties"]
jaxarith("merge", "--to-adapter", *ties, *both)

# %% [markdown]
# Adapters merge into the base too: `verify` shows that it is the same.

# %%
sums = ["--method", "task_arithmetic", "--overwrite", *both, "--out"]
jaxarith("merge", "--to-adapter", *sums, OUT / "lora_sum")
jaxarith("merge", "--base", BASE, *sums, OUT / "with_sum")
jaxarith("verify", BASE, OUT / "lora_sum", OUT / "with_sum")

# %% [markdown]
# ## Where to go next
#
# - `jaxarith merge --help`: all methods, tokenizers, slices, packed models.
# - `merged/README.md` and `merged/jaxarith_merge.json`: what was merged, and its notes.
# - `jaxarith extract BASE TUNED --rank 32 --out LORA` makes an adapter of a model.
