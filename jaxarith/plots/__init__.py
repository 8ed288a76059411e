"""Figures from plain arrays, as PNG files.

`style` holds the colours, dashes and hatches of all of them.
"""

from jaxarith.plots.bars import bars as bars
from jaxarith.plots.bars import by_task as by_task
from jaxarith.plots.bars import horizontal_bars as horizontal_bars
from jaxarith.plots.bars import ranked as ranked
from jaxarith.plots.grids import clustered as clustered
from jaxarith.plots.grids import disentanglement as disentanglement
from jaxarith.plots.grids import disentanglement_of_pairs as disentanglement_of_pairs
from jaxarith.plots.grids import landscape as landscape
from jaxarith.plots.grids import matrices as matrices
from jaxarith.plots.lines import against as against
from jaxarith.plots.lines import bands as bands
from jaxarith.plots.lines import curves as curves
from jaxarith.plots.lines import negation as negation
from jaxarith.plots.lines import repeated as repeated
from jaxarith.plots.lines import scatter as scatter
from jaxarith.plots.lines import two_scales as two_scales
from jaxarith.plots.overviews import overview as overview
from jaxarith.plots.style import Picture as Picture
