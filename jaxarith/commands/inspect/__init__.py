"""`jaxarith inspect`: norms, cosines and sign conflicts of task vectors in files."""

from jaxarith.commands.inspect.command import add as add
