"""What importing the library loads."""

import subprocess
import sys
from pathlib import Path

HEAVY = {
    *("flax", "transformers", "matplotlib", "torch", "tensorflow"),
    *("orbax", "grain", "datasets", "tensorflow_datasets"),
}


def test_importing_the_library_loads_nothing_heavy():
    code = "import jaxarith, jaxarith.merge, sys; print(*sys.modules)"
    root = Path(__file__).parents[1]
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, check=True
    ).stdout.decode()
    packages = {module.split(".")[0] for module in loaded.split()}
    assert "jaxarith" in packages
    assert not packages & HEAVY
