"""Fine-tuning of one or several tasks, ordinary or in the tangent space.

`config` holds the recipe, `batches` makes the batches, `step` is one optimizer step,
`run` is the loop with progress, log and checkpoints, and `observers` shows its metrics.
`delta` is the objective of a linearised teacher and an ordinary student. `distac`
repairs a finished task vector.
"""

from jaxarith.train.ahead import device_bytes as device_bytes
from jaxarith.train.ahead import lowered_step as lowered_step
from jaxarith.train.batches import joint_batches as joint_batches
from jaxarith.train.batches import seed_of as seed_of
from jaxarith.train.batches import task_batches as task_batches
from jaxarith.train.config import Distill as Distill
from jaxarith.train.config import Form as Form
from jaxarith.train.config import ProductDtype as ProductDtype
from jaxarith.train.config import TrainConfig as TrainConfig
from jaxarith.train.config import code as code
from jaxarith.train.config import optimizer as optimizer
from jaxarith.train.config import paper as paper
from jaxarith.train.config import schedule as schedule
from jaxarith.train.config import tak as tak
from jaxarith.train.config import tak_released as tak_released
from jaxarith.train.config import tak_released_weight as tak_released_weight
from jaxarith.train.distac import distac as distac
from jaxarith.train.distac import with_targets as with_targets
from jaxarith.train.observers import tensorboard as tensorboard
from jaxarith.train.run import Observe as Observe
from jaxarith.train.run import fine_tune as fine_tune
from jaxarith.train.step import init_state as init_state
from jaxarith.train.step import make_step as make_step
from jaxarith.train.step import objective as objective
