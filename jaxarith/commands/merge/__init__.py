"""`jaxarith merge`: merges as data, from flags and YAML files to checkpoint folders."""

from jaxarith.commands.merge.command import add as add
