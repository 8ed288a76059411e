"""What a script's folder is good for when it is started again."""

import dataclasses
import json

import pytest

from experiments import quickstart
from experiments.common import runs
from experiments.common.studies import evaluation
from jaxarith import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    steps: int = 3
    tasks: tuple[str, ...] = ("a", "b")
    mesh: str = "data=1"


def test_a_folder_of_the_same_options_is_taken_up(tmp_path):
    options = Options(out=tmp_path / "out")
    runs.start(options)
    assert not options.out.exists()
    runs.claim(options)
    assert json.loads((options.out / "config.json").read_text())["tasks"] == ["a", "b"]
    elsewhere = dataclasses.replace(options, mesh="data=2,fsdp=2", save_every=7)
    assert runs.start(elsewhere).size == 4


def test_other_options_are_refused_by_name_and_nothing_is_written(tmp_path):
    options = Options(out=tmp_path)
    runs.claim(options)
    before = (tmp_path / "config.json").read_text()
    other = dataclasses.replace(options, steps=4, tasks=("a",), mesh="")
    with pytest.raises(ValueError, match="other options") as caught:
        runs.start(other)
    message = str(caught.value)
    assert "steps: 3 there, 4 here" in message and "mesh" not in message
    assert "tasks: ['a', 'b'] there, ['a'] here" in message
    assert (tmp_path / "config.json").read_text() == before


def test_no_resume_forgets_what_was_trained(tmp_path):
    options = Options(out=tmp_path)
    for folder in (runs.checkpoints(options), runs.vectors(options)):
        folder.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    runs.claim(options)
    assert runs.checkpoints(options).exists() and runs.vectors(options).exists()
    anew = dataclasses.replace(options, steps=4, resume=False)
    runs.start(anew)
    runs.claim(anew)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_vectors_of_unknown_options_are_refused(tmp_path):
    (tmp_path / "task_vectors").mkdir()
    for resume in (True, False):
        with pytest.raises(ValueError, match="no config.json that says"):
            runs.start(Options(out=tmp_path, resume=resume))


def test_a_mesh_of_too_many_devices_is_found_before_anything_is_written(tmp_path):
    config = quickstart.Config(
        **dict(out=tmp_path / "out", tasks=("mnist", "uci_digits"), samples=48),
        **dict(merges=(), modes=("cyclic",), mesh="data=16"),
    )
    with pytest.raises(ValueError, match="asks for 16 devices"):
        quickstart.main(config)
    assert not config.out.exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        runs.start(Options(out=tmp_path / "out"))


class Stop(Exception):
    """What a study is stopped by here."""


def test_a_study_goes_on_with_the_methods_that_it_has_trained(
    tmp_path, monkeypatch, shallow_clip
):
    config = quickstart.Config(
        **dict(out=tmp_path, tasks=("mnist", "uci_digits"), merges=(), modes=()),
        **dict(model=shallow_clip, smoke=True, mesh="fsdp=2,data=2"),
    )
    fine_tune, trained = train.fine_tune, []

    def one_method(*args, names, **options):
        if len(trained) == 1:
            raise Stop
        trained.append(options["log"].stem)
        return fine_tune(*args, names=names, **options)

    monkeypatch.setattr(train, "fine_tune", one_method)
    with pytest.raises(Stop):
        quickstart.main(config)
    assert trained.pop() == "train_nonlinear"
    vectors = tmp_path / "task_vectors" / "nonlinear"
    before = {file.name: file.read_bytes() for file in vectors.iterdir()}
    assert len(before) == 2 and not (tmp_path / "checkpoints").exists()

    def stop(study, taus):
        assert taus.keys() == {"nonlinear", "linear"}
        raise Stop

    monkeypatch.setattr(evaluation, "evaluate_all", stop)
    with pytest.raises(Stop):
        quickstart.main(config)
    assert trained == ["train_linear"]
    assert before == {file.name: file.read_bytes() for file in vectors.iterdir()}
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 there, 0.1 here"):
        quickstart.main(dataclasses.replace(config, learning_rate=0.1))
