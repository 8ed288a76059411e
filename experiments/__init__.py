"""Scripts: one for each table and figure of the papers, and some for own data."""

import importlib.util
import sys

_missing = [
    name for name in ("matplotlib", "tyro") if not importlib.util.find_spec(name)
]
if _missing and sys.argv[0] == "-m":
    # `python -m` imports the package first. No script can start, not even to say so.
    _names = " and ".join(_missing)
    print(f"experiments need {_names}: pip install 'jaxarith[demo]'", file=sys.stderr)
    raise SystemExit(2)
