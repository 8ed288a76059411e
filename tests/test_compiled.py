"""Where scripts keep what they have compiled."""

import jax
import pytest

from experiments.common import compiled


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """JAX's settings as in a process that sets none, and an own cache."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(tmp_path):
    folder = compiled.keep()
    assert folder is not None and folder.is_relative_to(tmp_path / "jaxarith")
    assert folder.name.endswith(compiled.processor())
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == compiled.LARGEST


def test_a_folder_that_the_user_names_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compiled.keep() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "jaxarith").exists()


def test_where_no_folder_can_be_made_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.keep() is None
    assert jax.config.jax_compilation_cache_dir is None
