"""`jaxarith --print-completion`: what shells complete of the command."""

import builtins
import shlex
import subprocess

import pytest

from jaxarith import cli
from jaxarith.commands import completion


def printed(capsys, shell):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print-completion", shell])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_knows_subcommands_and_flags(capsys, shell):
    pytest.importorskip("shtab")
    text = printed(capsys, shell)
    for word in ("merge", "inspect", "vocabulary", "base-rows", "ties"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["me"], ["merge"]),
        (["recipe", ""], ["check"]),
        (["merge", "--method", "ti"], ["ties"]),
        (["merge", "--vocabulary", "b"], ["base-rows"]),
        (["merge", "--base", "some"], ["some_model"]),
        (["merge", "con"], ["config.yaml"]),
        (["merge", "--density", ""], []),
    ],
)
def test_bash_completes(capsys, tmp_path, words, completed):
    pytest.importorskip("shtab")
    (tmp_path / "completion").write_text(printed(capsys, "bash"))
    (tmp_path / "some_model").mkdir()
    (tmp_path / "config.yaml").touch()
    given = shlex.join(["jaxarith", *words])
    program = f"""
source ./completion
COMP_WORDS=({given}); COMP_CWORD={len(words)}
_shtab_jaxarith
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    command = ["bash", "--norc", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.decode().split() == completed


def test_without_shtab_the_error_says_what_to_install(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "shtab":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print-completion", "bash"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "pip install 'jaxarith[completion]'" in error
    assert len(error.splitlines()) == 1


def test_other_shells_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print-completion", "fish"])
    assert ended.value.code == 2
    assert "'bash', 'zsh', 'tcsh'" in capsys.readouterr().err.replace(
        "bash,", "'bash',"
    )
