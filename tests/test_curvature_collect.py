"""What curvature does not depend on, how it merges, and its files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_networks as tiny

from jaxarith import curvature, hub, sharding, tree

KEY = jax.random.key(0)


def same(a, b, **tolerances):
    tolerances = {"rtol": 1e-5, "atol": 1e-6} | tolerances
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b)


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def setting():
    return tiny.network("tanh", True, tokens=5, samples=8)


def collected(setting, samples=slice(None), **options):
    apply_fn, params, x = setting
    options = {"probes": 2, "key": KEY} | options
    return curvature.collect(apply_fn, params, [{"image": x[samples]}], **options)


def test_neither_batches_nor_chunks_nor_padding_matter(setting):
    apply_fn, params, x = setting
    whole = collected(setting)
    padded = [
        {"image": x[:3], "mask": np.ones(3, bool)},
        {
            "image": jnp.concatenate([x[3:], jnp.full_like(x[:1], np.nan)]),
            "mask": np.arange(6) < 5,
        },
    ]
    # A probe depends on its sample's place, which padding at the end leaves.
    for chunk in (2, 100):
        cut = curvature.collect(
            apply_fn, params, padded, probes=2, key=KEY, chunk=chunk
        )
        same(cut, whole)


@pytest.mark.devices
@pytest.mark.parametrize("sizes", ["data=2", "data=2,fsdp=2", "data=8"])
def test_devices_that_share_the_samples_find_the_same(setting, sizes):
    mesh = sharding.make_mesh(sizes)
    same(collected(setting, mesh=mesh), collected(setting))


def test_padded_tokens_count_for_nothing_in_whole_samples():
    apply_fn, params, x = tiny.network("tanh", False, tokens=5, samples=4)

    def pooled(params, x, valid):  # of valid tokens alone, as encoders of texts do
        features = apply_fn(params, x)
        weights = valid[..., None] / valid.sum(axis=-1)[:, None, None]
        return (features * weights).sum(axis=1)

    valid = (np.arange(5)[None] < np.array([5, 3, 4, 1])[:, None]).astype(np.float32)
    batch = {"x": x, "valid": valid}
    options = dict(inputs=("x", "valid"), probes=None)
    noise = {"x": x + 9.0 * (1 - valid)[..., None], "valid": valid}
    plain = curvature.collect(pooled, params, [batch], **options)
    same(curvature.collect(pooled, params, [noise], **options), plain)
    # The others take the mean over tokens, so they must be told which are real.
    options |= dict(sharing="expand", token_mask="valid")
    plain = curvature.collect(pooled, params, [batch], **options)
    same(curvature.collect(pooled, params, [noise], **options), plain)
    np.testing.assert_allclose(plain.divisors["first/kernel"], [13 / 4])


def test_features_by_token_count_as_their_mean():
    apply_fn, params, x = tiny.network("tanh", False, tokens=5, samples=4)
    batch = {"image": x, "valid": np.arange(5)[None] < np.full((4, 1), 3)}
    cut = {"image": x[:, :3]}
    options = dict(probes=None, sharing="whole")
    found = curvature.collect(
        apply_fn, params, [batch], penalty_mask="valid", **options
    )
    same(found, curvature.collect(apply_fn, params, [cut], **options))


@pytest.mark.parametrize("how", ["mean", "sum", "nearest", "each"])
def test_the_order_of_merged_tasks_changes_no_bit(setting, how):
    parts = [
        collected(setting, part, rank=2)
        for part in (slice(0, 3), slice(3, 5), slice(5, 8))
    ]
    weights = [3.0, 2.0, 3.0]
    first = curvature.merge(parts, how, weights)
    second = curvature.merge(
        [parts[i] for i in (2, 0, 1)], how, [weights[i] for i in (2, 0, 1)]
    )
    same_bits(first, second)


def test_a_task_that_stands_twice_is_the_task(setting):
    one, tau = collected(setting, rank=2), tiny.vector(setting[1])
    want = float(curvature.penalty(tau, one))
    for how, times in (("mean", 1), ("nearest", 1), ("each", 1), ("sum", 2)):
        merged = curvature.merge([one, one], how)
        found = float(curvature.penalty(tau, merged))
        np.testing.assert_allclose(found, times * want, rtol=1e-4)
    assert merged.sketch["first/kernel"].shape[0] == 2


def test_each_is_the_mean_of_the_forms(setting):
    parts = [collected(setting, part, rank=2) for part in (slice(0, 4), slice(4, 8))]
    tau = tiny.vector(setting[1])
    values = [float(curvature.penalty(tau, part)) for part in parts]
    merged = curvature.merge(parts, "each", weights=[1, 3])
    np.testing.assert_allclose(
        curvature.penalty(tau, merged), (values[0] + 3 * values[1]) / 4, rtol=1e-5
    )


@pytest.mark.usefixtures("x64")
def test_nearest_is_the_nearest_of_all_kronecker_products():
    setting = tiny.network("tanh", True, tokens=5, samples=9)
    parts = [collected(setting, slice(i, i + 3), probes=None) for i in (0, 3, 6)]
    target = tiny.kronecker_block(curvature.merge(parts, "each"), "first")
    found = tiny.kronecker_block(curvature.merge(parts, "nearest"), "first")
    # Van Loan, Pitsianis (1993): the best rank-one term of the rearranged matrix.
    rearranged = target.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16)
    left, values, right = np.linalg.svd(rearranged)
    best = np.sqrt(np.sum(values[1:] ** 2))
    np.testing.assert_allclose(np.linalg.norm(found - target), best, rtol=1e-9)
    mean = tiny.kronecker_block(curvature.merge(parts), "first")
    assert best < np.linalg.norm(mean - target)


def test_others_leave_out_a_task_s_own(setting):
    parts = [
        collected(setting, part) for part in (slice(0, 3), slice(3, 5), slice(5, 8))
    ]
    same_bits(curvature.others(parts)[1], curvature.merge([parts[0], parts[2]]))
    weighted = curvature.others(parts, weights=[1, 2, 3])[0]
    same_bits(weighted, curvature.merge(parts[1:], weights=[2, 3]))
    with pytest.raises(ValueError, match="expected 3 numbers"):
        curvature.others(parts, weights=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="1 task has no others"):
        curvature.others(parts[:1])


def test_files_hold_the_same_bits(setting, tmp_path):
    _, params, _ = setting
    one = collected(setting, rank=2, joint=True)
    for name, measured in {
        "factors": one,
        "blocks": curvature.block_diagonal(one, 2),
        "eigen": curvature.eigen(one),
        "diagonal": collected(setting, sharing=None),
    }.items():
        file = tmp_path / f"{name}.safetensors"
        curvature.save(file, measured, {"task": "digits"})
        loaded, metadata = curvature.load(file, params)
        assert metadata == {"task": "digits"}
        assert type(loaded) is type(measured)
        same_bits(measured, loaded)


@pytest.mark.devices
def test_factors_from_a_file_merge_on_other_devices_to_the_same_bits(setting, tmp_path):
    _, params, _ = setting
    mesh = sharding.make_mesh("data=2,fsdp=4")
    halves = [collected(setting, part, mesh=mesh) for part in (slice(4), slice(4, 8))]
    alone = curvature.merge([jax.device_get(half) for half in halves])
    for number, half in enumerate(halves):
        curvature.save(tmp_path / f"{number}.safetensors", half)
    loaded = [curvature.load(tmp_path / f"{n}.safetensors", params)[0] for n in (1, 0)]
    same_bits(curvature.merge(loaded), alone)


def test_curvature_of_other_parameters_is_refused(setting, tmp_path):
    _, params, _ = setting
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    one = collected(setting)
    curvature.save(tmp_path / "one.safetensors", one)
    with pytest.raises(ValueError, match="fingerprint"):
        curvature.load(tmp_path / "one.safetensors", other)
    with pytest.raises(ValueError, match="other fingerprints"):
        curvature.merge([one, dataclasses.replace(one, base=1)])
    with pytest.raises(ValueError, match="same select, joint, sharing"):
        curvature.merge([one, collected(setting, sharing="expand")])


def test_padding_may_hold_anything_beside_leaves_without_factors():
    params = {"w": np.ones((3, 2), np.float32)}
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    padded = {
        "image": np.concatenate([np.full((1, 3), np.nan, np.float32), x]),
        "mask": np.arange(5) > 0,
    }
    empty = {"image": padded["image"], "mask": np.zeros(5, bool)}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["w"])

    options = dict(probes=None, rank=2)
    found = curvature.collect(apply_fn, params, [empty, padded], **options)
    plain = curvature.collect(apply_fn, params, [{"image": x}], **options)
    same(found.diagonal, plain.diagonal)
    assert float(found.samples) == 4


def test_damaged_files_are_refused(setting, tmp_path):
    _, params, _ = setting
    file, one = tmp_path / "one.safetensors", collected(setting)
    hub.save_tree(file, {"w": np.ones(2)})
    with pytest.raises(ValueError, match="format"):
        curvature.load(file, params)
    skewed = one.inputs | {
        "first/kernel": one.inputs["first/kernel"].at[0, 0, 1].add(9)
    }
    curvature.save(file, dataclasses.replace(one, inputs=skewed))
    with pytest.raises(ValueError, match="not symmetric"):
        curvature.load(file, params)
    small = one.outputs | {"first/kernel": one.outputs["first/kernel"][:, :2, :2]}
    curvature.save(file, dataclasses.replace(one, outputs=small))
    with pytest.raises(ValueError, match="for a side of 4"):
        curvature.load(file, params)
    curvature.save(file, dataclasses.replace(one, outputs={}))
    with pytest.raises(ValueError, match="is missing"):
        curvature.load(file, params)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: {"divisors": {}}, "divisors of first/kernel are missing"),
        (lambda f: {"divisors": double(f.divisors)}, r"kernel have shape \[2\]"),
        (lambda f: {"outputs": double(f.outputs)}, "different numbers of terms"),
        (lambda f: {"sketch": dict([*f.sketch.items()][1:])}, "measured leaves differ"),
        (lambda f: {"layers": (curvature.Layer(("x",), (), False),)}, "a layer of x"),
        (lambda f: {"layers": f.layers[:1]}, "measured leaves differ"),
        (lambda f: {"sharing": "wide"}, "sharing is 'wide'"),
        (lambda f: {"samples": jnp.ones(2)}, "number of samples"),
    ],
)
def test_parts_that_do_not_fit_are_found_as_a_file_is_read(
    setting, tmp_path, damage, message
):
    _, params, _ = setting
    file, one = tmp_path / "one.safetensors", collected(setting, rank=2)
    curvature.save(file, dataclasses.replace(one, **damage(one)))
    with pytest.raises(ValueError, match=message):
        curvature.load(file, params)


def double(parts):
    return {name: jnp.concatenate([part, part]) for name, part in parts.items()}


def test_a_bias_that_the_layers_leave_out_is_missed(setting, tmp_path):
    _, params, _ = setting
    file, one = tmp_path / "one.safetensors", collected(setting)
    layers = tuple(layer._replace(biases=()) for layer in one.layers)
    curvature.save(file, dataclasses.replace(one, layers=layers))
    with pytest.raises(ValueError, match="for a side of 4|for a side of 3"):
        curvature.load(file, params)
    with pytest.raises(ValueError, match="found dict"):
        curvature.save(file, {})


def test_a_newer_format_is_named(setting, tmp_path):
    file = tmp_path / "one.safetensors"
    hub.save_tree(file, {"w": np.ones(2)}, {"format": "jaxarith.curvature 2"})
    with pytest.raises(ValueError, match="or update jaxarith"):
        curvature.load(file, setting[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probes": 0}, "at least 1, or None"),
        ({"key": None}, "random probes need a key"),
        ({"chunk": 0}, "chunk is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"select": "third/.*"}, "matches 'third"),
        ({"sharing": "wide"}, "sharing is 'wide'"),
        ({"penalty_mask": "valid"}, "no field 'valid'"),
    ],
)
def test_mistakes_are_one_sentence(setting, options, message):
    with pytest.raises(ValueError, match=message):
        collected(setting, **options)


def test_what_was_not_measured_is_not_free(setting):
    tau = tiny.vector(setting[1])
    part = collected(setting, select="first/.*")
    with pytest.raises(ValueError, match="second/bias, second/kernel: 2 of 4"):
        curvature.penalty(tau, part)
    assert float(curvature.penalty({"first": tau["first"]}, part)) > 0
    without_bias = {"first": {"kernel": tau["first"]["kernel"]}}
    assert float(curvature.penalty(without_bias, part)) > 0
    with pytest.raises(ValueError, match="not first/kernel"):
        curvature.penalty({"first": {"bias": tau["first"]["bias"]}}, part)


def test_values_that_are_not_finite_are_refused(setting):
    apply_fn, params, x = setting
    with pytest.raises(ValueError, match="NaN or infinite"):
        collected((apply_fn, params, x.at[3].set(jnp.nan)), rank=2)


def test_a_first_batch_without_rows_counts_for_nothing(setting):
    apply_fn, params, x = setting
    batches = [{"image": x[:0]}, {"image": x}]
    found = curvature.collect(apply_fn, params, batches, probes=2, key=KEY)
    same_bits(found, collected(setting))
    with pytest.raises(ValueError, match="no real sample"):
        curvature.collect(apply_fn, params, batches[:1], probes=2, key=KEY)


def test_factors_and_those_in_an_eigenbasis_are_told_apart(setting):
    apply_fn, params, x = setting
    one = collected(setting, rank=2)
    turned = curvature.eigen(one)
    for function in (
        lambda given: curvature.merge([given, given]),
        lambda given: curvature.block_diagonal(given, 2),
        curvature.calibrate,
        curvature.eigen,
    ):
        with pytest.raises(ValueError, match="found EigenFactors; expected Factors"):
            function(turned)
    with pytest.raises(ValueError, match="curvature.eigen"):
        curvature.correct(apply_fn, params, [{"image": x}], one, key=KEY)


def test_a_leaf_of_another_shape_is_not_broadcast():
    found = curvature.collect(
        lambda params, x: x @ params["w"],
        {"w": jnp.ones((3, 2))},
        [{"image": jnp.ones((1, 3))}],
        probes=None,
    )
    message = r"shape \[3, 2\], but the task vector has \[1"
    with pytest.raises(ValueError, match=message):
        curvature.penalty({"w": jnp.ones((1, 2))}, found)


@pytest.mark.parametrize(
    "batches", [[], [{"image": jnp.ones((1, 3)), "mask": [False]}]]
)
def test_no_sample_is_an_error(setting, batches):
    apply_fn, params, _ = setting
    with pytest.raises(ValueError, match="at least"):
        curvature.collect(apply_fn, params, batches, key=KEY)


def test_the_diagonal_is_that_of_the_exact_jacobian(setting):
    apply_fn, params, x = setting
    found = collected(setting, sharing=None, probes=None)
    assert not found.layers
    jacobian = tree.flatten(jax.jacrev(apply_fn)(params, x))
    exact = {path: jnp.sum(j**2, axis=(0, 1)) / 8 for path, j in jacobian.items()}
    same(found.diagonal, exact)
