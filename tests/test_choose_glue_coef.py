"""λ of τJp for GLUE: chosen on validation scores; the table takes its vectors."""

import dataclasses

import pytest

from experiments.common import bank
from experiments.common.language import t5_glue
from experiments.tau_jp import choose_glue_coef

Config = choose_glue_coef.Config


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"penalty_coefs": (0.1, 0.1)}, "each only once"),
        ({"penalty_coefs": (0.0,)}, "numbers above 0"),
        ({"coefs": (0.5, 1.0)}, "one coefficient"),
    ],
)
def test_candidates_that_cannot_be_compared_are_named(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        choose_glue_coef.main(Config(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_the_best_on_validation_is_chosen_and_the_table_finds_its_vectors(tmp_path):
    config = Config(
        smoke=True, out=tmp_path / "out", bank=tmp_path / "bank",
        penalty_coefs=(1e-3, 1e3), choose_on="mean",
    )  # fmt: skip
    found = choose_glue_coef.main(config)
    rows = found["rows"]
    assert [row["λ"] for row in rows] == [1e-3, 1e3]
    best = max(rows, key=lambda row: row["mean"])
    assert found["chosen"] == {"--penalty-coef": best["λ"]}
    assert rows[0]["each alone"] != rows[1]["each alone"]  # the penalty acts

    own = dataclasses.replace(config, penalty_coef=1e3, out=tmp_path / "table")
    study = t5_glue.start(own)
    [first, *_] = study.wanted["tau_jp_cyclic"]
    assert first.file.parent.name == "tau_jp_cyclic_coef_1000"
    assert bank.has(first.file, choose_glue_coef.training.identity(first))
    [plain, *_] = study.wanted["linear"]
    assert plain.file.parent.name == "linear"
