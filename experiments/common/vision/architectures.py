"""The sizes of the papers' CLIPs, for code that needs no weights."""

from pathlib import Path

from jaxarith import hub
from jaxarith.models import clip

# Image encoders; projection_dim is the width of the features.
VISION = {
    "vit-b-32": {"patch_size": 32, "projection_dim": 512},
    "vit-b-16": {"patch_size": 16, "projection_dim": 512},
    "vit-l-14": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14},
        **{"num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768},
    },
}
_SPELLINGS = {
    "vit-b-32": ("vit-base-patch32", "vit_base_patch32", "vit-b-32"),
    "vit-b-16": ("vit-base-patch16", "vit_base_patch16", "vit-b-16"),
    "vit-l-14": ("vit-large-patch14", "vit_large_patch14", "vit-l-14"),
}


def config_of(model: str) -> clip.CLIPConfig:
    """Returns the configuration of a model: a folder, or the id of a papers' model.

    The activation may differ from the real one; that changes no size.

    Raises:
      ValueError: the model is neither a folder with a config.json nor a known id.

    Example:
      >>> config_of("laion/CLIP-ViT-B-16-laion2B-s34B-b88K").vision.patch_size
      16
    """
    if (Path(model) / "config.json").is_file():
        return clip.CLIPConfig.from_json(hub.read_json(Path(model)))
    for name, spellings in _SPELLINGS.items():
        if any(spelling in model.lower() for spelling in spellings):
            width = VISION[name]["projection_dim"]
            raw = {"vision_config": VISION[name], "text_config": {}}
            return clip.CLIPConfig.from_json(raw | {"projection_dim": width})
    raise ValueError(
        f"{model} has no config.json, so its sizes are not known. Name a folder that "
        f"has one, or a model called {', '.join(_SPELLINGS)}."
    )
