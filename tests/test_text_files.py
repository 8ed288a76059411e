"""Tables and texts that scripts are given: what is wrong in them, with its line."""

import pytest

from experiments.common.language import text_files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,toxicity\na,1\nb\xff,1\n", "not text in UTF-8: line 3"),
        ("a.csv", b"text,text\na,1\n", "has the column text twice"),
        ("a.csv", b"text,toxicity\na\n", "line 2 has more or fewer cells"),
        ("a.csv", b"text,toxicity\na,1,2\n", "line 2 has more or fewer cells"),
        ("a.jsonl", b'{"text": 1, "text": 2}', "line 1 is not JSON: .* a key twice"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: it is nested"),
        ("a.jsonl", b"[" + b"1," * 10**5 + b"1]", "line 1 is .*; expected a JSON obj"),
    ],
)
def test_a_broken_table_says_what_is_wrong_with_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        text_files.read_table(tmp_path / name)
    assert name in str(error.value) and len(str(error.value)) < 1000


def test_long_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,toxicity\n{'x' * 200_000},1\n")
    [row] = text_files.read_table(tmp_path / "a.csv", ["text"])
    assert len(row["text"]) == 200_000


def test_a_task_is_read_in_the_encoding_asked_for(tmp_path):
    lines = [f"{i % 2} caf\xe9 {i}" for i in range(40)]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode("latin-1"))
    option = f"mood={tmp_path / 'a.txt'}"
    with pytest.raises(ValueError, match="a.txt, line 1 is not in utf-8"):
        text_files.read_task(option, text_files.Options())
    task = text_files.read_task(option, text_files.Options(encoding="latin-1"))
    assert all("caf\xe9" in record["text"] for record in task.train)
