"""Eight virtual devices; rank promotion and warnings at our own code are errors."""

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# The same examples on every run, and no deadline: a new shape is a compilation.
hypothesis.settings.register_profile("claims", deadline=None, derandomize=True)
hypothesis.settings.load_profile("claims")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error:::(jaxarith|test_|oracles)")
