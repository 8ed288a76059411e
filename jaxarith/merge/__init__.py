"""Merge operators: `merge.method(params_0, taus, ...) -> params`.

Every method is a plain function of pre-trained parameters and task vectors, any pytrees
of arrays. It works leaf by leaf, on one stacked leaf `[task, ...]` at a time, after
passes that gather small statistics of all leaves where the method needs them. Sums are
taken in float32 or better and cast once, to the dtype of `params_0`.
"""

from jaxarith.merge.average import average as average
from jaxarith.merge.awd import awd as awd
from jaxarith.merge.task_arithmetic import task_arithmetic as task_arithmetic
from jaxarith.merge.ties import ties as ties
