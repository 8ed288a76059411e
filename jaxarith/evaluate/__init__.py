"""Outputs of edited models, searches of coefficients, and measures of both.

`bounds`, `landscape`, `perplexity`, `rank`, `smoothness` and `toxicity` are imported by
name.
"""

from jaxarith.evaluate.disentanglement import (
    disentanglement_error as disentanglement_error,
)
from jaxarith.evaluate.outputs import OutputsAt as OutputsAt
from jaxarith.evaluate.outputs import TangentOutputs as TangentOutputs
from jaxarith.evaluate.outputs import forward as forward
from jaxarith.evaluate.outputs import labels as labels
from jaxarith.evaluate.outputs import outputs as outputs
from jaxarith.evaluate.outputs import tangent as tangent
from jaxarith.evaluate.search import ExternalSearch as ExternalSearch
from jaxarith.evaluate.search import NegationSearch as NegationSearch
from jaxarith.evaluate.search import Search as Search
from jaxarith.evaluate.search import TaskSearch as TaskSearch
from jaxarith.evaluate.search import search as search
from jaxarith.evaluate.search import search_external as search_external
from jaxarith.evaluate.search import search_negation as search_negation
from jaxarith.evaluate.search import search_per_task as search_per_task
from jaxarith.evaluate.sweeps import sweep as sweep
from jaxarith.evaluate.sweeps import sweep_all as sweep_all
