"""Checkpoint files <-> trees of arrays, in the formats of the Hugging Face Hub.

`folders` reads and writes whole checkpoints, `safetensors` single tensors of them,
`layouts` knows the names of tensors, and `lora` reads adapters.
"""

from jaxarith.hub.folders import ADAPTER as ADAPTER
from jaxarith.hub.folders import find as find
from jaxarith.hub.folders import load as load
from jaxarith.hub.folders import load_tree as load_tree
from jaxarith.hub.folders import names as names
from jaxarith.hub.folders import open_tensors as open_tensors
from jaxarith.hub.folders import read as read
from jaxarith.hub.folders import read_json as read_json
from jaxarith.hub.folders import save as save
from jaxarith.hub.folders import save_tree as save_tree
from jaxarith.hub.folders import shards as shards
from jaxarith.hub.folders import side_files as side_files
from jaxarith.hub.folders import staging as staging
from jaxarith.hub.folders import write as write
