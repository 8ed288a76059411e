"""Eight virtual devices; rank promotion and warnings at our own code are errors.

And the fixtures that many files share.
"""

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# The same examples on every run, and no deadline: a new shape is a compilation.
hypothesis.settings.register_profile("claims", deadline=None, derandomize=True)
hypothesis.settings.load_profile("claims")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error:::(jaxarith|test_|oracles)")


@pytest.fixture
def x64():
    """The test computes in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip(
        "torch", reason="PyTorch, the oracle of the ports, is not installed"
    )
