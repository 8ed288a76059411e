"""Data-free merges of ordinary vectors, for comparison with sums of trained vectors."""

from experiments.common.vision import setups
from jaxarith import merge, task_vectors
from jaxarith.typing import Taus, Tree


def merged(setup: setups.Setup, taus: Taus) -> dict[str, Tree]:
    """Returns merged vectors at coefficient 1, with the defaults of the library."""
    params_0 = setup.params_0
    models = {
        "TSV-M": merge.tsv(params_0, taus, coef=1.0),
        "Iso-C": merge.iso_c(params_0, taus, coef=1.0),
        "TIES": merge.ties(params_0, taus, coef=1.0),
    }
    return {
        name: task_vectors.difference(params, params_0)
        for name, params in models.items()
    }
