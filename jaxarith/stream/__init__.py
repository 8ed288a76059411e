"""Merges of checkpoints that are larger than memory, from files to files."""

from jaxarith.hub import check_out as check_out
from jaxarith.stream.opened import Opened as Opened
from jaxarith.stream.opened import open_models as open_models
from jaxarith.stream.rerowed import Rerowing as Rerowing
from jaxarith.stream.restacked import Slice as Slice
from jaxarith.stream.restacked import open_slices as open_slices
from jaxarith.stream.stacked import Layers as Layers
from jaxarith.stream.written import SHARD_BYTES as SHARD_BYTES
from jaxarith.stream.written import Plan as Plan
from jaxarith.stream.written import Report as Report
from jaxarith.stream.written import merge as merge
from jaxarith.stream.written import plan as plan
from jaxarith.stream.written import sha256 as sha256
