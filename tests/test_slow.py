"""The list of slow tests names tests that exist."""

from pathlib import Path

FOLDER = Path(__file__).parent


def test_slow_tests_exist():
    lines = (FOLDER / "slow.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert len(listed) > 100 and len(set(listed)) == len(listed)
    missing = []
    for line in listed:
        file, _, name = line.partition("[")[0].partition("::")
        if f"\ndef {name}(" not in (FOLDER.parent / file).read_text():
            missing.append(line)
    assert not missing
