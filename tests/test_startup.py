"""What the command does not import before it is asked for it."""

import subprocess
import sys

# What one subcommand or one flag alone needs, and takes long to import.
LATER = ("jaxarith.commands.adapters", "jinja2", "shtab", "matplotlib", "flax", "torch")


def test_a_merge_imports_nothing_of_other_commands():
    program = (
        "import sys\n"
        "from jaxarith import cli\n"
        "cli.main(['merge', 'none.yaml', 'out'])\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    loaded = done.stdout.split()
    assert "jaxarith.commands.merge" in loaded
    early = [m for m in loaded if any(m == x or m.startswith(f"{x}.") for x in LATER)]
    assert not early
