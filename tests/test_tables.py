import pytest

from experiments.common import tables

TEXT = """A table.

Published:

    method       coefficient  ViT-B-32       ViT-B-16
    Pre-trained  -            47.3 / -       54.5 / -
    Non-lin. FT  1.0          (19.9 / 20.5)  19.1 / > 1e10
    Ours         2            100 / 97.6     -

Another:

    task   clusters
    mnist  mnist,svhn dtd
"""


def test_a_table_is_read_by_column():
    assert tables.published_by_column(TEXT, "method", "coefficient") == {
        ("ViT-B-32", "Pre-trained", ""): (47.3, None),
        ("ViT-B-32", "Non-lin. FT", "1.0"): (19.9, 20.5),
        ("ViT-B-32", "Ours", 2): (100, 97.6),
        ("ViT-B-16", "Pre-trained", ""): (54.5, None),
        ("ViT-B-16", "Non-lin. FT", "1.0"): (19.1, "> 1e10"),
    }


def test_a_table_is_read_by_row():
    found = tables.published(TEXT, "task", value=str.split)
    assert found == {"mnist": (["mnist,svhn", "dtd"],)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no table", "0 tables"),
        ("a  b\n\na  c\n", "2 tables"),
        ("a  b  c\nx  1\n", "2 cells"),
        ("a  b\nx  one\n", "'one'"),
        ("a  b\nx  1\nx  2\n", "twice"),
        ("a  b\nx  1\ny  1 / 2\n", "different numbers"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tables.published(text, "a")
