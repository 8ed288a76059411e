"""Eight virtual devices; rank promotion and warnings at our own code are errors.

And the fixtures that many files share.
"""

import functools
import importlib.metadata
import os
import shutil
import signal
import tempfile
from pathlib import Path

# One cache for all that compiles in one run of the suite, in workers and in the
# processes that tests start: they inherit the variable of the first process.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="jaxarith_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
else:
    _OWN_CACHE = None

# Most of the suite's time is LLVM's, for programs that run once. What XLA itself does
# with them stays as it is: collectives, buffers, FLOPs.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)
# The default way from fusions to LLVM takes twice as long. Other versions may lack the
# flag, and a flag that XLA does not know ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

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


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    lines = Path(__file__).with_name("slow.txt").read_text().splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    for item in items:
        if slow & {item.nodeid, item.nodeid.partition("[")[0]}:
            item.add_marker("slow")


def pytest_unconfigure(config):
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _fewer_programs():
    """Frees compiled programs before their memory maps are as many as Linux allows.

    Beyond 65530 maps of one process XLA crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def default_emitters():
    """Fusions compiled as XLA does by default, for programs whose bits are compared."""
    if "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]:
        yield
        return
    from jax._src import compiler  # of the one version that has the flag

    options = functools.partial(
        compiler.get_compile_options,
        env_options_overrides={"xla_cpu_use_fusion_emitters": True},
    )

    def with_default(*args, env_options_overrides=None, **others):
        assert not env_options_overrides
        return options(*args, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", with_default)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """The test computes in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def heard_hangup():
    """SIGHUP acts as it does in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def bank_folder(tmp_path_factory):
    """One bank for all scripts; of several workers too, whose vectors are the same."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bank"


@pytest.fixture
def shared_bank(bank_folder, shallow_clip):
    """That bank, for smoke runs on images, which then take the shallow CLIP."""
    return bank_folder


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory):
    """The embedded CLIP with one layer in each tower, for fast compilation."""
    from jaxarith import hub, tree
    from jaxarith.models import clip

    folder = tmp_path_factory.mktemp("shallow") / clip.TINY_CLIP.name
    model = clip.load()
    config = hub.read_json(model.folder)
    for tower in ("vision_config", "text_config"):
        config[tower]["num_hidden_layers"] = 1
    params = tree.select(model.params, r"(?!.*/layers/[1-9]).*")
    hub.save(folder, params, config, copy_from=model.folder)
    return folder


@pytest.fixture
def shallow_clip(shallow_folder, monkeypatch):
    """The same in place of the embedded CLIP, which smoke runs take."""
    from jaxarith.models import clip

    monkeypatch.setattr(clip, "TINY_CLIP", shallow_folder)
    return shallow_folder


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip(
        "torch", reason="PyTorch, the oracle of the ports, is not installed"
    )
