"""The scripts behind the papers' tables and figures, and what they share.

All need the packages of the extra `demo`; a script names those that are missing in one
line, before anything else is imported.
"""

import importlib.util
import sys

_DEMO = "matplotlib mlxtend PIL sklearn tokenizers transformers tyro".split()
if _MISSING := [name for name in _DEMO if importlib.util.find_spec(name) is None]:
    _MESSAGE = f"missing: {', '.join(_MISSING)}; run pip install 'jaxarith[demo]'."
    if sys.argv[0] != "-m":  # imported by a program
        raise ImportError(_MESSAGE)
    print(_MESSAGE, file=sys.stderr)
    sys.exit(2)
