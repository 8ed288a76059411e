"""Unpacks packed (quantised) weights into numbers: one file for each format.

Every format has a function that unpacks its arrays, and a function `read` that finds
its weights among the tensors of a checkpoint. A weight is unpacked each time it is
read, and is not kept in memory.
"""

from jaxarith.hub.quantised import gguf as gguf
from jaxarith.hub.quantised.opened import READERS as READERS
from jaxarith.hub.quantised.opened import dequantised as dequantised
