"""The CLIPs of the papers by their sizes, for what needs no weights."""

from pathlib import Path

from jaxarith import hub
from jaxarith.models import clip

# Of the image encoders; projection_dim is the width of the features.
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
    """The configuration of a model that is a folder, or one of the papers' by its id.

    The activation may be another, which changes no size.

    Raises:
      ValueError: it is no folder, and its id is none of those.

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
        f"the sizes of {model} are not known without its config.json. Name a folder "
        f"that has one, or a model called {', '.join(_SPELLINGS)}."
    )
