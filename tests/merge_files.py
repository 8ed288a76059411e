"""Files of mergekit's form, and a model and task vectors that they merge."""

import numpy as np
import pytest

from jaxarith.commands.merge import mergekit_yaml

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(LAYERS)
        for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {name: (4,) if "norm" in name else (4, 6) for name in NAMES}
    return {name: rng.normal(size=shapes[name]).astype("f4") for name in NAMES}


@pytest.fixture(scope="module")
def base():
    return random_tree(0)


@pytest.fixture(scope="module")
def taus():
    return [random_tree(1), random_tree(2)]


@pytest.fixture
def read(tmp_path):
    def read_text(text, **options):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return mergekit_yaml.read(path, **options)

    return read_text


TIES = """
models:
  - model: base
    # no parameters necessary for the base model
  - model: math
    parameters: {density: 0.5, weight: 0.3}
  - model: code
    parameters:
      density: 0.25
      weight: 1e-1
merge_method: ties
base_model: base
parameters:
  normalize: false
  int8_mask: true
dtype: bfloat16
"""


SLERP = """
slices:
  - sources:
      - model: a
        layer_range: [0, 5]
      - model: b
        layer_range: [0, 5]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.2]
    - value: 0.5
dtype: float32
tokenizer_source: base
"""
