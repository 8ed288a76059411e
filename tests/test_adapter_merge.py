"""Adapters merged to an adapter by `jaxarith merge --to-adapter`."""

import functools
import json

import adapter_folders
import jax
import numpy as np
import pytest
from adapter_folders import PREFIX, SHAPES, normal, read, write
from safetensors.numpy import load_file

from jaxarith import cli, merge

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of several ranks and scales; the second is rank-stabilised."""
    place = tmp_path_factory.mktemp("adapters")
    lacking = {m: x for m, x in SHAPES.items() if "layers.1" not in m}
    return {
        "one": write(place / "one", 1),
        "stable": write(
            place / "stable", 2, rank=2, use_rslora=True, lora_alpha=7, r=2
        ),
        "fewer": write(place / "fewer", 3, {**lacking, DOWN: (6, 10)}, rank=1),
    }


def run(models, out, *options, method="task_arithmetic"):
    named = [part for model in models for part in ("--model", str(model))]
    arguments = ["merge", "--to-adapter", "--quiet", "--method", method, *named]
    return cli.main([*arguments, "--out", str(out), *map(str, options)])


def result(out):
    """The delta of each layer by what PEFT makes of the folder."""
    pairs, config = read(out)
    assert config["peft_type"] == "LORA" and not config["use_rslora"]
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(pairs) == sorted(config["target_modules"])
    for module, (a, _) in pairs.items():
        pattern = "^" + module.replace(".", r"\.")
        assert len(a) == config["rank_pattern"].get(pattern, config["r"])
    return {module: b @ a for module, (a, b) in pairs.items()}


def expected(models, coefs):
    total = {}
    for model, coef in zip(models, coefs, strict=True):
        for module, delta in adapter_folders.deltas(model).items():
            total[module] = total.get(module, 0) + coef * delta
    return total


def close(actual, wanted, tolerance=1e-6):
    assert actual.keys() == wanted.keys()
    for module, delta in wanted.items():
        scale = np.abs(delta).max()
        np.testing.assert_allclose(
            actual[module], delta, atol=tolerance * scale, err_msg=module
        )


@pytest.mark.parametrize("name", ["one", "stable", "fewer"])
def test_one_adapter_of_weight_1_comes_back(folders, tmp_path, name):
    assert run([folders[name]], tmp_path / "out") == 0
    close(result(tmp_path / "out"), adapter_folders.deltas(folders[name]))


@pytest.mark.parametrize("coefs", [(1, 1, 1), (0.3, -0.7, 2)])
def test_the_sum_of_deltas_is_exact_and_ranks_add(folders, tmp_path, coefs):
    models = [*folders.values()]
    assert run(models, tmp_path / "out", "--coef", *coefs) == 0
    close(result(tmp_path / "out"), expected(models, coefs))
    pairs, _ = read(tmp_path / "out")
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    assert ranks == {m: 6 if "layers.0" in m else 5 for m in SHAPES} | {DOWN: 1}


def test_configurations_of_older_versions_and_bases_without_a_name(tmp_path):
    nameless = {"base_model_name_or_path": None}
    models = [
        write(tmp_path / "0", 0, **nameless),
        write(tmp_path / "1", 1, **nameless, ensure_weight_tying=False, revision=None),
    ]
    assert run(models, tmp_path / "out", "--coef", 1, 2) == 0
    close(result(tmp_path / "out"), expected(models, (1, 2)))


def test_means_and_mergekits_linear_methods(folders, tmp_path):
    models = [folders["one"], folders["stable"]]
    assert run(models, tmp_path / "a", "--weight", 3, 1, method="average") == 0
    assert run(models, tmp_path / "b", "--weight", 3, 1, method="linear") == 0
    options = ("--preset", "mergekit", "--weight", 0.75, 0.25)
    assert run(models, tmp_path / "c", *options) == 0
    for out in "abc":
        close(result(tmp_path / out), expected(models, (0.75, 0.25)))


def test_a_mean_that_would_scale_the_base_is_refused(folders, tmp_path, capsys):
    models = [folders["one"], folders["stable"]]
    options = ("--weight", 0.5, 0.4, "--normalize", "false")
    assert run(models, tmp_path / "out", *options, method="linear") == 1
    assert "sum to 0.9, which would scale the base" in capsys.readouterr().err


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], np.sum(s[:rank] ** 2) / np.sum(s**2)


def test_a_rank_is_the_best_of_its_kind_and_its_energy_is_told(folders, tmp_path):
    models, coefs = [*folders.values()], (0.3, -0.7, 2)
    out = tmp_path / "out"
    assert run(models, out, "--coef", *coefs, "--adapter-rank", 2) == 0
    total = expected(models, coefs)
    close(result(out), {module: truncated(x, 2)[0] for module, x in total.items()})
    told = json.loads((out / "jaxarith_merge.json").read_text())["adapter"]
    shares = {module: truncated(x, 2)[1] for module, x in total.items()}
    for row in told["layers"]:
        np.testing.assert_allclose(row["energy"], shares[row["module"]], rtol=1e-9)
    norms = {module: np.sum(x**2) for module, x in total.items()}
    kept = sum(norms[module] * shares[module] for module in total)
    np.testing.assert_allclose(told["energy"], kept / sum(norms.values()), rtol=1e-9)
    worst = min(shares, key=lambda module: shares[module])
    assert (told["rank"], told["worst_module"]) == (2, worst)


TSV = functools.partial(merge.tsv, coef=0.5)


@pytest.mark.parametrize("rank", [None, 2])
def test_tsv_in_core_space_is_tsv_of_the_deltas(tmp_path, rank):
    models = [write(tmp_path / f"{i}", i, rank=2) for i in range(3)]
    options = [] if rank is None else ["--adapter-rank", rank]
    assert run(models, tmp_path / "out", "--coef", 0.5, *options, method="tsv") == 0
    taus = [
        {f"{m}.weight": x for m, x in adapter_folders.deltas(model).items()}
        for model in models
    ]
    with jax.enable_x64(True):
        found = TSV(jax.tree.map(np.zeros_like, taus[0]), taus)
    wanted = {m: np.asarray(found[f"{m}.weight"]) for m in SHAPES}
    if rank:
        wanted = {module: truncated(x, rank)[0] for module, x in wanted.items()}
    close(result(tmp_path / "out"), wanted)
    pairs, _ = read(tmp_path / "out")
    assert {len(a) for a, _ in pairs.values()} == {rank or 6}


def test_entrywise_methods_run_in_core_space(folders, tmp_path):
    models = [folders["one"], folders["stable"]]
    assert run(models, tmp_path / "out", "--density", 0.5, method="ties") == 0
    found = result(tmp_path / "out")
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0.1 for x in found.values())
    again = run(models, tmp_path / "again", "--density", 0.5, method="ties")
    assert again == 0
    close(result(tmp_path / "again"), found, 0)


def test_wrappers_and_random_methods(folders, tmp_path):
    models = [folders["one"], folders["stable"]]
    options = ("--drop-rate", 0.5, "--after", "svc")
    assert run(models, tmp_path / "out", *options, method="dare") == 0
    assert run(models, tmp_path / "same", *options, method="dare") == 0
    close(result(tmp_path / "same"), result(tmp_path / "out"), 0)


def test_gradients_over_layers(folders, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"""
merge_method: task_arithmetic
base_model: org/base
models:
  - model: {folders["one"]}
    parameters: {{weight: [0, 1]}}
  - model: {folders["stable"]}
    parameters: {{weight: 1}}
parameters: {{normalize: false}}
"""
    )
    out = tmp_path / "out"
    arguments = ["merge", str(file), str(out), "--to-adapter", "--quiet"]
    assert cli.main(arguments) == 0
    one, other = (adapter_folders.deltas(folders[x]) for x in ("one", "stable"))
    close(result(out), {m: ("layers.1" in m) * one[m] + other[m] for m in SHAPES})


def test_tokenizers_belong_to_models(folders, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"merge_method: task_arithmetic\nbase_model: org/base\n"
        f"tokenizer_source: base\nmodels: [{{model: {folders['one']}, "
        "parameters: {weight: 1}}]\n"
    )
    arguments = ["merge", str(file), str(tmp_path / "out"), "--to-adapter"]
    assert cli.main(arguments) == 1
    assert "tokenizer_source is for models" in capsys.readouterr().err


def test_embeddings_and_convolutions_keep_their_form(tmp_path):
    def tensors(seed):
        return {
            f"{PREFIX}embed.lora_embedding_A": normal(seed, 3, 11),
            f"{PREFIX}embed.lora_embedding_B": normal(seed, 6, 3),
            f"{PREFIX}stem.lora_A.weight": normal(seed, 3, 2, 3, 3),
            f"{PREFIX}stem.lora_B.weight": normal(seed, 4, 3, 1, 1),
        }

    given = [tensors(5), tensors(6)]
    models = [
        write(tmp_path / f"{i}", shapes={}, tensors=x) for i, x in enumerate(given)
    ]
    out = tmp_path / "out"
    assert run(models, out, "--adapter-rank", 5) == 0
    found = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 5 and sorted(config["target_modules"]) == ["embed", "stem"]
    scale = 5 / 3

    def total(make):
        return scale * sum(make(x).astype(np.float64) for x in given)

    table = total(
        lambda x: (
            x[f"{PREFIX}embed.lora_embedding_B"] @ x[f"{PREFIX}embed.lora_embedding_A"]
        )
    )
    a, b = (found[f"{PREFIX}embed.lora_embedding_{side}"] for side in "AB")
    np.testing.assert_allclose(b @ a, truncated(table, 5)[0], atol=1e-5)
    a, b = (found[f"{PREFIX}stem.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((4, 2, 3, 3), (4, 4, 1, 1))  # of rank 4 at most
    stem = total(
        lambda x: (
            x[f"{PREFIX}stem.lora_B.weight"].reshape(4, 3)
            @ x[f"{PREFIX}stem.lora_A.weight"].reshape(3, -1)
        )
    )
    np.testing.assert_allclose(b.reshape(4, 4) @ a.reshape(4, -1), stem, atol=1e-5)


def saved(seed, name="score.weight", rows=2):
    return {f"{PREFIX}{name}": normal(seed, rows, 6)}


def test_whole_tensors_are_averaged_without_the_base(tmp_path):
    models = [
        write(tmp_path / f"{i}", i, tensors=saved(i), modules_to_save=["score"])
        for i in range(2)
    ]
    options = ("--weight", 1, 3)
    assert run(models, tmp_path / "out", *options, method="average") == 0
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = (normal(0, 2, 6) + 3 * normal(1, 2, 6)) / 4
    np.testing.assert_allclose(found[f"{PREFIX}score.weight"], wanted, atol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]


def test_whole_tensors_move_from_a_base_that_is_given(tmp_path, capsys):
    from merge_command import checkpoint

    start = normal(9, 2, 6)
    base = checkpoint(tmp_path / "base", {"score.weight": start})
    given = {"modules_to_save": ["score"], "base_model_name_or_path": base}
    models = [write(tmp_path / f"{i}", i, tensors=saved(i), **given) for i in range(2)]
    models.append(write(tmp_path / "none", 2, base_model_name_or_path=base))
    for method, options in (
        ("task_arithmetic", ("--coef", 0.5)),
        ("ties", ("--density", 1, "--coef", 0.5, "--aggregate", "sum")),
    ):
        out = tmp_path / method
        assert run(models, out, "--base", base, *options, method=method) == 0
        found = load_file(out / "adapter_model.safetensors")[f"{PREFIX}score.weight"]
        if method == "task_arithmetic":
            wanted = start + 0.5 * (normal(0, 2, 6) + normal(1, 2, 6) - 2 * start)
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert np.abs(found - start).max() > 0.1
    elsewhere = [
        write(tmp_path / f"e{i}", i, tensors=saved(i), modules_to_save=["score"])
        for i in range(2)
    ]
    assert run(elsewhere, tmp_path / "no", "--coef", 1) == 1
    assert "score.weight is a whole tensor of the adapters" in capsys.readouterr().err


def spoiled(place, **options):
    return write(place / "spoiled", 4, **options)


EMBED = {f"{PREFIX}embed.lora_magnitude_vector": normal(0, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"base_model_name_or_path": "org/other"},
            "have different bases: 'org/base'",
        ),
        ({"task_type": "SEQ_CLS"}, "differ in task_type: 'CAUSAL_LM' in"),
        ({"revision": "v2"}, "differ in revision"),
        ({"use_dora": True}, "use_dora: DoRA's lengths depend on the base"),
        ({"target_parameters": ["w"]}, "target_parameters: its factors are of param"),
        ({"shapes": {"model.layers.0.mlp.up_proj": (9, 6)}}, "to different models"),
        (
            {"shapes": {"layers.0.mlp.up_proj": (10, 6)}},
            "different classes of the base",
        ),
        ({"tensors": {f"{PREFIX}fc.bias": normal(0, 6)}}, "has trained biases"),
        ({"r": 4}, "states the rank 4"),
        ({"shapes": {}}, "holds no tensors"),
    ],
)
def test_what_is_no_adapter_of_the_base_is_refused(
    folders, tmp_path, capsys, options, message
):
    spoiled = write(tmp_path / "spoiled", 4, **options)
    assert run([folders["one"], spoiled], tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["spoiled"]


def test_methods_and_flags_that_do_not_fit_are_refused(folders, tmp_path, capsys):
    models, out = [folders["one"], folders["stable"]], tmp_path / "out"

    def error(*options, method="task_arithmetic", models=models):
        assert run(models, out, *options, method=method) == 1
        return capsys.readouterr().err

    assert "slerp merges whole models" in error("--t", 0.5, method="slerp")
    fusion = {"method": "arcee_fusion", "models": models[:1]}
    assert "needs the base's weights" in error(**fusion)
    assert "not 'org/another'" in error("--base", "org/another")
    assert "for models, not for adapters" in error("--missing", "base")
    from merge_command import checkpoint

    model = checkpoint(tmp_path / "model", {"a.weight": normal(0, 2, 2)})
    assert "is not a PEFT adapter" in error(models=[model, folders["one"]])
    plain = ["merge", "--method", "average", "--adapter-rank", "3", "--model", model]
    assert cli.main([*plain, "--out", str(out)]) == 1
    assert "--adapter-rank is the rank for --to-adapter" in capsys.readouterr().err


def test_the_plan_is_printed_and_nothing_written(folders, tmp_path, capsys):
    models = [folders["one"], folders["stable"]]
    assert run(models, tmp_path / "out", "--dry-run", "--adapter-rank", 4) == 0
    assert "rank     4 (the sum of the ranks is 5)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_card_record_and_side_files(folders, tmp_path, capsys):
    models = []
    for i in range(2):
        models.append(write(tmp_path / f"{i}", i))
        (tmp_path / f"{i}" / "tokenizer.json").write_text("{}")
        (tmp_path / f"{i}" / "vocab.txt").write_text(str(i))
    out = tmp_path / "out"
    named = [part for model in models for part in ("--model", model)]
    arguments = ["merge", "--to-adapter", "--method", "task_arithmetic", *named]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "rank 6, energy kept 100.00%" in shown.out
    assert "differ between the adapters and are not copied: vocab.txt" in shown.err
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "jaxarith_merge.json",
        "tokenizer.json",
    ]
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "base_model:\n- org/base" in card
    record = json.loads((out / "jaxarith_merge.json").read_text())
    assert len(record["inputs"][1]["sha256"]["adapter_model.safetensors"]) == 64
    assert cli.main([*arguments, "--out", str(out)]) == 1  # it exists
    assert cli.main([*arguments, "--quiet", "--overwrite", "--out", str(out)]) == 0
