"""mergekit's merges, tensor by tensor as its version 0.1.5 defines them.

They give the models that people's mergekit files give; the operators of
`jaxarith.merge` follow the papers, which differ. Parameters are named as in those
files, `lambda` apart, which is `coef`. Every number that a file can set by layer or by
filter may be a function of a tensor's path.

mergekit merges task vectors, or, without a base model, the models themselves. Here
these are the task vectors of parameters that are zero: `linear`, `slerp`, `karcher`,
`nuslerp` and `multislerp` then are those of the models.

All sums are taken in float32 or better and cast once; mergekit computes most in the
dtype of the checkpoints. Its `int8_mask` has no effect on a result, nor here.

`karcher` is that of `jaxarith.merge`, which differs where models of norm below 1e-5
meet others, and where directions cancel: mergekit then takes that of the first model.
"""

from jaxarith.merge.karcher import karcher as karcher
from jaxarith.merge.mergekit.arithmetic import (
    generalized_task_arithmetic as generalized_task_arithmetic,
)
from jaxarith.merge.mergekit.averages import linear as linear
from jaxarith.merge.mergekit.averages import model_stock as model_stock
from jaxarith.merge.mergekit.averages import multislerp as multislerp
from jaxarith.merge.mergekit.averages import nuslerp as nuslerp
from jaxarith.merge.mergekit.averages import slerp as slerp
from jaxarith.merge.mergekit.fusion import arcee_fusion as arcee_fusion
from jaxarith.merge.mergekit.fusion import ram as ram
from jaxarith.merge.mergekit.fusion import ramplus_tl as ramplus_tl
from jaxarith.merge.mergekit.passthrough import passthrough as passthrough
from jaxarith.merge.mergekit.selections import nearswap as nearswap
from jaxarith.merge.mergekit.selections import sce as sce
