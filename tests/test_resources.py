"""Limits of threads."""

import subprocess
import sys

# What JAX does when it compiles its first factorisation, and what our merges do when
# they factor their first matrix.
AT_ONCE = """
import importlib, threading
from jaxarith import resources

def as_jax():
    importlib.import_module("scipy.linalg.cython_blas")

def as_we():
    with resources.one_blas_thread():
        pass

threads = [threading.Thread(target=each) for each in (as_we, as_jax)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_blas_is_limited_while_jax_loads_it_in_another_thread():
    run = subprocess.run(
        [sys.executable, "-c", AT_ONCE], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""  # a thread prints the error that ends it
