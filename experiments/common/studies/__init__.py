"""The procedure of a study of merging, for any model and data.

A study fine-tunes on every task in several ways (ordinary, linearised, linearised with
the curvature of the other tasks, or with the τJp penalty). It merges, searches
coefficients, evaluates, and writes a table, figures, task vectors and a merged
checkpoint. `quickstart` and `text_study` provide model and tasks.

Its tables and figures are Tables 1 and 6 and Figure 6 of this paper, on other data:
Yoshida et al. Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement. ICLR 2025.
"""

from experiments.common.studies.evaluation import Outputs as Outputs
from experiments.common.studies.evaluation import linearized_at as linearized_at
from experiments.common.studies.evaluation import linearized_single as linearized_single
from experiments.common.studies.evaluation import linearized_sum as linearized_sum
from experiments.common.studies.evaluation import merge_rows as merge_rows
from experiments.common.studies.evaluation import outputs_of as outputs_of
from experiments.common.studies.procedure import run as run
from experiments.common.studies.study import Config as Config
from experiments.common.studies.study import Dataset as Dataset
from experiments.common.studies.study import Study as Study
from experiments.common.studies.study import check as check
from experiments.common.studies.study import datasets as datasets
from experiments.common.studies.training import fine_tune as fine_tune
from experiments.common.studies.training import recipe_of as recipe_of
