"""Packed (quantised) weights as numbers: one file for each format.

Every format has a function of its arrays, and `read`, which finds its weights among the
tensors of a checkpoint. A weight is unpacked whenever it is read, and not kept.
"""

from jaxarith.hub.quantised import gguf as gguf
from jaxarith.hub.quantised.opened import READERS as READERS
from jaxarith.hub.quantised.opened import dequantised as dequantised
