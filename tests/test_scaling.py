"""What is counted of a compiled program, and the report of it."""

import json

import jax
import pytest

from experiments.bench import collectives, encoders, scaling, scaling_report
from experiments.bench.collectives import Collective
from jaxarith import sharding, tree
from jaxarith.sharding import mesh as meshes

pytestmark = pytest.mark.devices

PROGRAM = """HloModule step, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %inner = (s32[], f32[8]{0}) while(%state), condition=%more, body=%nested, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %r = f32[8]{0} all-reduce(%x), channel_id=9, replica_groups=[2,4]<=[8], \
to_apply=%add
}

%nested (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %p = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%more (state: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (input: f32[64,32]) -> f32[16,32] {
  %whole = f32[64,32]{1,0:T(8,128)S(1)} all-reduce(%input), channel_id=7, \
replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[16,32]{1,0} dynamic-slice(%whole, %i, %zero)
}

%fused.1 (part: bf16[8,4]) -> bf16[8,16] {
  ROOT %g.1 = bf16[8,16]{0,1:T(8,128)(2,1)} all-gather(%part), channel_id=3, \
replica_groups={}, dimensions={1}, frontend_attributes={chain_id="5"}
}

%fused.2 (part: bf16[8,4]) -> bf16[8,16] {
  ROOT %g.2 = bf16[8,16]{0,1:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=3, \
replica_groups={}, dimensions={1}, frontend_attributes={chain_id="5"}
}

%unused (x: f32[4]) -> f32[4] {
  ROOT %never = f32[4]{0} all-reduce(%x), to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %t = (f32[3,5]{1,0}, /*index=1*/f32[]{:T(128)}, pred[6]{0}) all-reduce(%x, %y, %z), \
channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
  %s = (f32[10]{0}, f32[]) all-reduce-start(%x, %y), replica_groups={{0,1},{2,3}}, \
to_apply=%add
  %d = (f32[10]{0}, f32[]) all-reduce-done(%s)
  %as = ((f32[2]{0}, s8[4]{0}), (f32[8]{0}, s8[16]{0})) all-gather-start(%x, %y), \
replica_groups={{0,1,2,3}}, dimensions={0}
  %ad = (f32[8]{0}, s8[16]{0}) all-gather-done(%as)
  %rs = f32[5]{0} reduce-scatter(%x), replica_groups={{0,1}}, to_apply=%add
  %aa = f32[6,2]{1,0} all-to-all(%x), replica_groups={{0,1,2}}, dimensions={0}
  %f.1 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %f.2 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
  %f.3 = f32[16,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %w = (s32[], f32[8]{0}) while(%x), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"other":1}
}
"""


def test_every_form_of_a_collective_is_counted_as_often_as_it_runs():
    assert sorted(collectives.collectives(PROGRAM, 8)) == sorted(
        [
            Collective("all-reduce", 3 * 5 * 4 + 4 + 6, 4),
            Collective("all-reduce", 10 * 4 + 4, 2),
            Collective("all-gather", 8 * 4 + 16, 4),
            Collective("reduce-scatter", 2 * 5 * 4, 2),
            Collective("all-to-all", 6 * 2 * 4, 3),
            Collective("all-gather", 8 * 16 * 2, 8),  # shown in two fusions
            Collective("reduce-scatter", 64 * 32 * 4, 4),  # a sum of which a part stays
            Collective("all-reduce", 8 * 4, 4, times=3),
            Collective("collective-permute", 8 * 4, 8, times=6),
        ]
    )


def test_a_loop_of_unknown_length_is_not_guessed():
    text = PROGRAM.replace('"known_trip_count":{"n":"3"},', "")
    with pytest.raises(ValueError, match="is in a loop, and the program does not say"):
        collectives.collectives(text, 8)


@pytest.mark.parametrize(
    ("groups", "together"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
        ("replica_groups={}", 8),
        ("channel_id=1", 8),
    ],
)
def test_groups_of_devices_are_read_in_every_form(groups, together):
    text = (
        f"ENTRY %main () -> f32[] {{\n  %x = f32[3] all-reduce(%y), {groups}, a=b\n}}"
    )
    assert collectives.collectives(text, 8) == [Collective("all-reduce", 12, together)]


def test_groups_in_another_form_are_not_guessed():
    text = "ENTRY %main () {\n  %x = f32[3] all-reduce(%y), replica_groups=V3(2)\n}"
    with pytest.raises(ValueError, match=r"a form that is not known: V3\(2\)"):
        collectives.collectives(text, 8)


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("all-reduce", 2 * 7 / 8 * 4096),
        ("all-gather", 7 / 8 * 4096),
        ("reduce-scatter", 7 / 8 * 4096),
        ("all-to-all", 7 / 8 * 4096),
        ("collective-permute", 4096),
    ],
)
def test_a_ring_of_eight_sends_its_published_share(name, sent):
    assert Collective(name, 4096, 8).sent == sent
    assert Collective(name, 4096, 8, times=5).sent == 5 * sent


def test_the_binding_batch_takes_as_long_to_send_for_as_to_compute():
    chip = scaling_report.Chip("", flops=100.0, sends=10.0)
    row = {"scattered_bytes": 40.0, "flops": 1600.0, "batch_per_device": 8}
    assert scaling_report.binding_batch(row, chip) == 2  # 4 s to send, 2 s for a sample


SCATTERED = """HloModule step

%fused (a: f32[8], i: s32[]) -> f32[2] {
  %p.1 = s32[] parameter(1)
  %p.0 = f32[8]{0} parameter(0)
  ROOT %s = f32[2]{0} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[4] {
  %t = (f32[8]{0}, f32[4]{0}) all-reduce(%x, %y), replica_groups={{0,1,2,3}}, \
to_apply=%add
  %g0 = f32[8]{0} get-tuple-element(%t), index=0
  %g1 = f32[4]{0} get-tuple-element(%t), index=1
  %u = f32[2]{0} fusion(%g0, %i), kind=kLoop, calls=%fused
  %one = f32[12]{0} all-reduce(%z), replica_groups={{0,1},{2,3}}, to_apply=%add
  %half = f32[6]{0} dynamic-slice(%one, %i), dynamic_slice_sizes={6}
  ROOT %v = f32[4]{0} add(%g1, %g1)
}
"""


def test_a_sum_of_which_a_part_is_read_counts_as_a_reduce_scatter():
    assert collectives.collectives(SCATTERED, 4) == [
        *(Collective("all-reduce", 48, 4), Collective("all-reduce", 48, 2))
    ]
    assert collectives.collectives(SCATTERED, 4, scattered=True) == [
        *(Collective("reduce-scatter", 32, 4), Collective("all-reduce", 16, 4)),
        Collective("reduce-scatter", 48, 2),
    ]
    # Another reader, of all of it; and a part of another size.
    for text in (
        SCATTERED.replace("add(%g1, %g1)", "add(%g1, %g0)"),
        SCATTERED.replace("f32[2]", "f32[4]"),
    ):
        first = collectives.collectives(text, 4, scattered=True)[0]
        assert first == Collective("all-reduce", 48, 4)


def test_devices_of_fsdp_sum_parts_and_only_parts_are_summed_over_data(monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SHARDED", 256)
    mesh = sharding.make_mesh("data=2,fsdp=4")
    compiled = scaling.program(encoders.encoder("tiny", layers=1), mesh, 4)
    found = collectives.collectives(compiled.as_text() or "", 8, scattered=True)
    sharded = 4 * sum(leaf.size for leaf in jax.tree.leaves(LAYOUT) if leaf.size >= 256)

    def size(name, devices):
        of = (one for one in found if (one.name, one.devices) == (name, devices))
        return sum(one.size for one in of)

    assert size("all-gather", 4) == 2 * sharded  # θ0 and τ, once
    # All but vectors and positions, which are summed over all devices.
    parts = size("reduce-scatter", 4)
    assert 0.97 * sharded < parts < sharded
    assert size("all-reduce", 2) == parts / 4
    assert size("all-reduce", 8) == pytest.approx(WHOLE - parts, abs=8)


MESHES = ("data=1", "data=2", "fsdp=2")


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "scaling"
    config = scaling.Config(
        out,
        models=("tiny",),
        meshes=MESHES,
        curvature=("fsdp=2",),
        batch_per_device=32,
        layers=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "SMALLEST_SHARDED", 256)
        results = scaling.main(config)
    rows = {row["mesh"]: row for row in results["rows"] if not row["curvature"]}
    return out, results, rows


def test_the_penalty_of_curvature_is_counted_by_what_it_adds(counted):
    out, results, rows = counted
    [curved] = [row for row in results["rows"] if row["curvature"]]
    plain = rows["fsdp=2"]
    assert curved["mesh"] == "fsdp=2" and curved["flops"] > 1.01 * plain["flops"]
    [added] = scaling_report.what_curvature_adds(results["rows"])
    assert added["flop_ratio"] == curved["flops"] / plain["flops"]
    # The step reads the factors besides.
    assert added["added"]["arguments MB"] > 0
    assert "What the penalty of curvature adds" in (out / "report.md").read_text()


def test_texts_are_compiled_too():
    encoder = encoders.encoder("t5-small-encoder", layers=1, length=8)
    found = scaling.count(scaling.program(encoder, sharding.make_mesh("data=2"), 1), 2)
    assert found["flops"] > 1e6 and found["collectives"]["all-reduce"]["count"] == 1


LAYOUT = encoders.encoder("tiny", layers=1).layout
WHOLE = 4 * tree.size(LAYOUT)  # bytes of a gradient


def test_replicated_devices_meet_once_for_gradients_and_the_loss(counted):
    _, _, rows = counted
    assert rows["data=1"]["collectives"] == {}
    assert rows["data=2"]["collectives"] == {
        "all-reduce": {"count": 1, "bytes": WHOLE + 4, "sent_bytes": WHOLE + 4}
    }


def test_sharded_devices_gather_what_they_keep_parts_of(counted):
    _, _, rows = counted
    sharded = [leaf for leaf in jax.tree.leaves(LAYOUT) if leaf.size >= 256]
    assert 0 < len(sharded) < len(jax.tree.leaves(LAYOUT))
    gathered = rows["fsdp=2"]["collectives"]["all-gather"]
    # θ0 and τ.
    assert gathered["count"] == 2 * len(sharded)
    assert gathered["bytes"] == 2 * 4 * sum(leaf.size for leaf in sharded)
    # Gradients, the loss, and a part of the norm of each leaf that is sharded.
    scalars = rows["fsdp=2"]["collectives"]["all-reduce"]["bytes"] - WHOLE
    assert 4 <= scalars <= 4 * (2 + 2 * len(sharded))


def test_weak_scaling_leaves_the_work_of_a_device_as_it_is(counted):
    _, _, rows = counted
    one = rows["data=1"]
    assert one["flops"] > 5e7
    for row in rows.values():
        assert row["flops"] == pytest.approx(one["flops"], rel=0.01)
    # Parameters, task vector and two moments, and little else but the images.
    assert 4 * WHOLE < one["argument_bytes"] < 6 * WHOLE
    assert rows["data=2"]["argument_bytes"] == pytest.approx(
        one["argument_bytes"], rel=1e-3
    )
    saved = one["argument_bytes"] - rows["fsdp=2"]["argument_bytes"]
    assert saved == pytest.approx(2 * WHOLE, rel=0.05)


def test_the_report_has_a_row_for_every_program_and_figures(counted):
    out, results, rows = counted
    assert sorted(file.name for file in out.iterdir()) == [
        *("flops.png", "report.json", "report.md", "sent.png")
    ]
    assert json.loads((out / "report.json").read_text()) == results
    assert tuple(rows) == MESHES
    text = (out / "report.md").read_text()
    assert all(f"| {mesh} " in text for mesh in MESHES)
    assert "None of the collectives are in loops" in text
    assert [limit["mesh"] for limit in results["limits"]] == ["data=2", "fsdp=2"]
    assert all(limit > 0 for limit in results["limits"][0]["batch_per_device"].values())
    assert (out / "sent.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "models is"),
        ({"meshes": ("data=2", "data=2")}, "each once"),
        ({"meshes": ("model=2",)}, "is not an axis with its size"),
        ({"meshes": ("task=2",)}, "the step here is one task's"),
        ({"meshes": ("data=512",)}, "512 devices are asked for"),
        ({"batch_per_device": 0}, "batch_per_device is 0"),
        ({"meshes": ("data=3",), "platform": "tpu"}, "no slice of TPU v5e has 3 chips"),
    ],
)
def test_options_that_cannot_work_are_errors_before_the_work(
    tmp_path, options, message
):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        scaling.main(scaling.Config(out, **{"meshes": ("data=2",), **options}))
    assert not out.exists()


def test_a_missing_compiler_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.importlib.util, "find_spec", lambda name: None)
    config = scaling.Config(tmp_path / "out", meshes=("data=8",), platform="tpu")
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tpu\]'"):
        scaling.main(config)
