"""mergekit's merges, tensor by tensor, as its version 0.1.5 defines them.

They return the models that mergekit's files define. The operators of `jaxarith.merge`
follow the papers, which differ. Parameters have the names of those files, except
`lambda`, which is `coef`. Every number that a file can set by layer or by filter may be
a function of a tensor's path.

mergekit merges task vectors, or, without a base model, the models themselves. In the
second case `params_0` is zero here and the task vectors are the models. Then `linear`,
`slerp`, `karcher`, `nuslerp` and `multislerp` merge the models.

All sums are taken in float32 or better and cast once; mergekit computes most sums in
the dtype of the checkpoints. mergekit's `int8_mask` has no effect on a result, neither
there nor here.

`karcher` is the function of `jaxarith.merge`. It differs from mergekit in two cases: if
a model has a norm below 1e-5, and if directions cancel. In the latter case mergekit
takes the direction of the first model.
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
