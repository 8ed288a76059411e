"""The subcommands of `jaxarith`: each file adds its own with `add(commands)`."""
