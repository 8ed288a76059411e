"""Meshes of devices, the placement of leaves on them, and runs of several processes."""

from jaxarith.sharding.mesh import AXES as AXES
from jaxarith.sharding.mesh import BATCH as BATCH
from jaxarith.sharding.mesh import SMALLEST_SHARDED as SMALLEST_SHARDED
from jaxarith.sharding.mesh import batch_shards as batch_shards
from jaxarith.sharding.mesh import constrain as constrain
from jaxarith.sharding.mesh import for_tasks as for_tasks
from jaxarith.sharding.mesh import from_local_rows as from_local_rows
from jaxarith.sharding.mesh import initialize as initialize
from jaxarith.sharding.mesh import local_rows as local_rows
from jaxarith.sharding.mesh import make_mesh as make_mesh
from jaxarith.sharding.mesh import mesh_of as mesh_of
from jaxarith.sharding.mesh import of_samples as of_samples
from jaxarith.sharding.mesh import on_mesh as on_mesh
from jaxarith.sharding.mesh import one_device as one_device
from jaxarith.sharding.mesh import pin as pin
from jaxarith.sharding.mesh import put as put
from jaxarith.sharding.mesh import shard as shard
from jaxarith.sharding.mesh import shardings as shardings
from jaxarith.sharding.mesh import spec as spec
from jaxarith.sharding.mesh import spread as spread
from jaxarith.sharding.mesh import to_host as to_host
from jaxarith.sharding.mesh import whole as whole
