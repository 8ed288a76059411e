"""`python -m jaxarith`: the `jaxarith` command."""

import sys

from jaxarith.cli import main

sys.exit(main())
