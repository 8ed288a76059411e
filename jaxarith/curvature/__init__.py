"""Curvature: statistics of the other tasks' inputs, for a penalty without their data.

`collect` measures the factors of a task, and `merge` joins the factors of several
tasks. `penalty` is their quadratic form; `eigen` and `correct` make it more accurate.
`save` and `load` store factors in files.
"""

from jaxarith.curvature.collect import collect as collect
from jaxarith.curvature.collect import correct as correct
from jaxarith.curvature.compression import block_diagonal as block_diagonal
from jaxarith.curvature.compression import calibrate as calibrate
from jaxarith.curvature.compression import eigen as eigen
from jaxarith.curvature.factors import Curvature as Curvature
from jaxarith.curvature.factors import EigenFactors as EigenFactors
from jaxarith.curvature.factors import Factors as Factors
from jaxarith.curvature.factors import Sharing as Sharing
from jaxarith.curvature.factors import check_base as check_base
from jaxarith.curvature.factors import penalty as penalty
from jaxarith.curvature.factors import product as product
from jaxarith.curvature.factors import weighted as weighted
from jaxarith.curvature.files import load as load
from jaxarith.curvature.files import save as save
from jaxarith.curvature.matrices import Layer as Layer
from jaxarith.curvature.merging import How as How
from jaxarith.curvature.merging import merge as merge
from jaxarith.curvature.merging import others as others
