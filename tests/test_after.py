"""`jaxarith merge --after`: wrappers of the merged vector, by flags and in YAML."""

import checkpoints
import merge_command
import numpy as np
import pytest
from merge_command import fails, load, run, write

from jaxarith import cli, hub, merge, task_vectors

models = merge_command.models
TA = ("--method", "task_arithmetic", "--dtype", "float32", "--quiet")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    base, folders = checkpoints.family(tmp_path_factory.mktemp("wrapped"), dtype="f32")
    return [base, *folders]


def in_memory(family):
    params_0 = hub.read(family[0])
    taus = [task_vectors.difference(hub.read(f), params_0) for f in family[1:]]
    return params_0, taus, merge.task_arithmetic(params_0, taus)


def test_wrappers_follow_one_another_as_flags_say(family, tmp_path):
    after = ("--after", "svc:alpha=0.5,matrices=.*proj.*", "--after", "lines:beta=0.4")
    assert run(list(map(str, family)), tmp_path / "out", *TA, *after) == 0
    params_0, taus, merged = in_memory(family)
    once = merge.svc(params_0, taus, merged, alpha=0.5, matrices=".*proj.*")
    twice = merge.lines(params_0, taus, once, beta=0.4)
    found = load(tmp_path / "out")
    for path in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        np.testing.assert_allclose(found[path], twice[path], rtol=1e-5, atol=1e-6)
        assert np.abs(found[path] - merged[path]).max() > 1e-3


def test_a_file_and_its_card_say_the_same(family, tmp_path):
    text = f"""
        merge_method: task_arithmetic
        preset: paper
        base_model: {family[0]}
        models: [{{model: {family[1]}}}, {{model: {family[2]}}}]
        after: [svc, {{subspace_boosting: {{beta: 0.2, coef: 0.5}}}}]
        dtype: float32
    """
    config = write(tmp_path / "merge.yaml", text)
    assert cli.main(["merge", config, str(tmp_path / "one"), "--quiet"]) == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "subspace_boosting" in card and "svc" in card
    flags = ["--after", "svc", "--after", "subspace_boosting:beta=0.2,coef=0.5"]
    assert run(list(map(str, family[:3])), tmp_path / "two", *TA, *flags) == 0
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for path, leaf in one.items():
        assert leaf.tobytes() == two[path].tobytes(), path


@pytest.mark.parametrize(
    ("after", "match"),
    [
        ("iso", "no wrapper 'iso'; known are svc, lines"),
        ("svc:beta=1", "svc has no option 'beta'; it has alpha, coef"),
        ("lines", "lines needs beta, for example lines:beta=0.5"),
        ("svc:alpha=x", "alpha of svc is 'x'; it must be a number"),
        ("svc:1", "expected NAME or NAME:OPTION=VALUE"),
        ("svc:alpha=0", "alpha is 0.0; it must be above 0"),
        ("svc:matrices=nothing", "no 2-D leaf matches"),
        ("subspace_boosting:beta=2", "beta is 2.0; it must be in [0, 1]"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_mistakes_are_one_line_and_nothing_is_written(
    after, match, dry, family, tmp_path, capsys
):
    folders = list(map(str, family))
    assert run(folders, tmp_path / "out", *TA, "--after", after, *dry) == 1
    err = capsys.readouterr().err
    assert match in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_a_wrapper_needs_a_base_and_a_file_names_the_line(models, tmp_path, capsys):
    err = fails(
        capsys, "--method", "average", "--model", models[1], "--model", models[2],
        "--after", "svc", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "svc changes a merged task vector" in err and "Name the base" in err
    text = f"merge_method: ties\nbase_model: {models[0]}\nmodels:\n"
    text += f"- model: {models[1]}\n  parameters: {{weight: 1}}\nafter:\n- nothing\n"
    config = write(tmp_path / "merge.yaml", text)
    err = fails(capsys, config, tmp_path / "out")
    assert "merge.yaml, line 7" in err and "no wrapper 'nothing'" in err
