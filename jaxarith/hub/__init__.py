"""Checkpoint files <-> trees of arrays, in the formats of the Hugging Face Hub.

- `download` finds the folder of a checkpoint, and `folders` finds the tensors in it.
- `reading` and `writing` read and write whole checkpoints and trees.
- `safetensors` handles that file format, and `layouts` the names of tensors.
- `lora` handles adapters of PEFT, and `lycoris` those of kohya.
- `quantised` unpacks packed weights.
- `vectors` opens files of task vectors.
- `open_clip` opens the files of OpenCLIP.
- `pickles` opens PyTorch's own files and reads them as data only.
"""

from jaxarith.hub.download import find as find
from jaxarith.hub.folders import ADAPTER as ADAPTER
from jaxarith.hub.folders import CONFIG as CONFIG
from jaxarith.hub.folders import INDEX as INDEX
from jaxarith.hub.folders import MSGPACK as MSGPACK
from jaxarith.hub.folders import WEIGHTS as WEIGHTS
from jaxarith.hub.folders import Checkpoint as Checkpoint
from jaxarith.hub.folders import names as names
from jaxarith.hub.folders import open_checkpoint as open_checkpoint
from jaxarith.hub.folders import open_tensors as open_tensors
from jaxarith.hub.folders import read_json as read_json
from jaxarith.hub.folders import shards as shards
from jaxarith.hub.folders import side_files as side_files
from jaxarith.hub.folders import weight_files as weight_files
from jaxarith.hub.places import RECORD as RECORD
from jaxarith.hub.places import check_out as check_out
from jaxarith.hub.places import publish as publish
from jaxarith.hub.places import staging as staging
from jaxarith.hub.places import state as state
from jaxarith.hub.quantised import dequantised as dequantised
from jaxarith.hub.reading import filled as filled
from jaxarith.hub.reading import load as load
from jaxarith.hub.reading import load_tree as load_tree
from jaxarith.hub.reading import read as read
from jaxarith.hub.stored import Stored as Stored
from jaxarith.hub.vectors import Vector as Vector
from jaxarith.hub.vectors import is_vector as is_vector
from jaxarith.hub.vectors import open_vector as open_vector
from jaxarith.hub.writing import save as save
from jaxarith.hub.writing import save_tree as save_tree
from jaxarith.hub.writing import write as write
