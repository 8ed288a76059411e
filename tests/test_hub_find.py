"""Finding a checkpoint in a folder, in the download cache or on the Hub."""

import types

import huggingface_hub
import pytest

from jaxarith import hub
from jaxarith.hub import open_clip, pickles

# Finding a checkpoint. The Hub's client is replaced: no test uses the network.


def pretend_hub(monkeypatch, names, downloads):
    """A Hub that holds one repository with files of these names."""

    def model_info(model, *, revision):
        files = [types.SimpleNamespace(rfilename=name) for name in names]
        return types.SimpleNamespace(siblings=files)

    def snapshot_download(model, **options):
        downloads.append((model, options))
        return "/cache/snapshot"

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_find_returns_a_local_folder_as_it_is(tmp_path):
    assert hub.find(tmp_path) == tmp_path
    assert hub.find(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "weights, wanted, unwanted",
    [
        (["model.safetensors"], "model*.safetensors", "*.msgpack"),
        (["model.safetensors.index.json"], "model*.safetensors", "*.msgpack"),
        (["flax_model.msgpack"], "flax_model.msgpack", "*.safetensors"),
    ],
)
def test_find_downloads_weights_in_one_format(monkeypatch, weights, wanted, unwanted):
    downloads = []
    others = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    pretend_hub(monkeypatch, others + weights, downloads)
    found = hub.find("openai/clip", revision="refs/pr/32")
    [(model, options)] = downloads
    assert str(found) == "/cache/snapshot"
    assert (model, options["revision"]) == ("openai/clip", "refs/pr/32")
    assert wanted in options["allow_patterns"]
    assert {"*.json", "*.txt", "*.model", "*.jinja", "*.py"} < set(
        options["allow_patterns"]
    )
    assert len(options["allow_patterns"]) == 6
    assert unwanted not in options["allow_patterns"]


@pytest.mark.parametrize("weights", open_clip.WEIGHTS)
def test_find_downloads_weights_of_openclip_where_there_are_no_others(
    monkeypatch, weights
):
    downloads = []
    pretend_hub(monkeypatch, [open_clip.CONFIG, "timm.png", weights], downloads)
    hub.find("timm/vit_base_patch32_clip_224.laion2b_e16")
    [(_, options)] = downloads
    assert weights in options["allow_patterns"]


def test_find_downloads_what_belongs_to_a_model(monkeypatch):
    wanted = ["source.spm", "LICENSE", "bpe.codes", "2_Dense/model.safetensors"]
    unwanted = ["README.md", ".gitattributes", "optimizer.pt", "onnx/model.onnx"]
    others = ["model.safetensors", "modules.json", "x.json"]
    downloads = []
    pretend_hub(monkeypatch, wanted + unwanted + others, downloads)
    hub.find("a/b")
    [(_, options)] = downloads
    assert set(wanted) < set(options["allow_patterns"])
    assert not set(unwanted) & set(options["allow_patterns"])


def test_a_name_may_have_a_revision(monkeypatch):
    downloads = []
    pretend_hub(monkeypatch, ["model.safetensors"], downloads)
    hub.find("a/b@v1.0")
    [(model, options)] = downloads
    assert (model, options["revision"]) == ("a/b", "v1.0")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_find_downloads_files_of_pytorch_where_it_is_installed(monkeypatch, name):
    monkeypatch.setattr(pickles, "readable", lambda: True)
    downloads = []
    pretend_hub(monkeypatch, ["config.json", name, "tf_model.h5"], downloads)
    hub.find("a/b")
    [(_, options)] = downloads
    assert options["allow_patterns"][-1] == "pytorch_model*.bin"


def test_find_refuses_a_repository_of_pickles_before_any_download(monkeypatch):
    monkeypatch.setattr(pickles, "readable", lambda: False)
    downloads = []
    pretend_hub(monkeypatch, ["config.json", "pytorch_model.bin"], downloads)
    with pytest.raises(ValueError, match="no checkpoint in openai/clip(.|\n)*pickle"):
        hub.find("openai/clip")
    assert downloads == []


def test_find_without_network_uses_the_download_cache(monkeypatch):
    downloads = []
    pretend_hub(monkeypatch, [], downloads)

    def offline(model, *, revision):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    assert str(hub.find("openai/clip")) == "/cache/snapshot"
    assert downloads == [("openai/clip", {"revision": None, "local_files_only": True})]


@pytest.mark.parametrize("model", ["nobody/nothing", "./nowhere", "a b/c/d"])
def test_find_of_what_is_nowhere_is_one_clear_error(monkeypatch, tmp_path, model):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        hub.find(model, revision="v1")
    message = str(error.value)
    at = " at revision 'v1'" if model == "nobody/nothing" else ""  # others are paths
    assert message.startswith(f"{model!r}{at} is not a folder")
    assert "Repo id" not in message
    assert "name a folder that holds" in message
