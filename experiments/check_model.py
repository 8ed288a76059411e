"""Checks a CLIP and the papers' data on this machine, before anything is trained.

    python -m experiments.check_model openai/clip-vit-base-patch32 --data-dir DATA
    python -m experiments.check_model jaxarith/assets/tiny_clip --source small \\
        --tasks mnist uci_digits --control small_letters --samples 200

Each of four checks is OK, failed, or not possible here; the report says why:

    layout          the checkpoint has all tensors of the model, and no others
    parity          image and text features of four inputs equal those of transformers,
                    to 1e-4 of the largest
    zero-shot       test accuracy of every task before training, or which data to fetch.
                    With all test images, it must be within two points of the published
                    accuracy, if there is one
    step            three linearised training steps: finite losses, seconds, memory

The exit status is 0 if nothing failed and the model was found. For a quick look,
--samples N uses N images of every split.

Published zero-shot accuracy in percent. The rows are "Pretrained" in Tables 1, 2 and 4
of the AWD paper (arXiv:2411.18729). ImageNet is from Table 1 of the editing paper. The
linear-layers paper has means of 48.40, 55.25 and 66.40:

    model     sun397  cars  resisc45  eurosat  svhn  gtsrb  mnist  dtd   imagenet
    ViT-B-32  62.3    59.7  60.7      45.5     31.4  32.6   48.5   43.8  63.4
    ViT-B-16  63.8    64.6  65.7      54.5     52.0  43.3   51.7   45.1  68.3
    ViT-L-14  66.8    77.7  71.0      59.9     58.4  50.5   76.3   55.3  75.5
"""

import dataclasses

import tyro

from experiments.common import runs, script, tables
from experiments.common.vision import model_checks, options
from jaxarith.models import clip

# The scripts' names of the tasks, in the order of the columns.
_COLUMNS = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb")
_COLUMNS += ("mnist", "dtd", "imagenet")
PUBLISHED: dict[str, dict[str, float]] = {
    model: dict(zip(_COLUMNS, values, strict=True))
    for model, values in tables.published(__doc__, "model").items()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(options.Options):
    """Check a CLIP and the papers' data."""

    model: tyro.conf.Positional[str]
    """A CLIP: a folder, or an id of the Hugging Face Hub."""


@script.full_precision
def main(config: Config) -> dict:
    """Runs all checks; exits with status 1 if one failed or the model is missing."""
    config = options.smoke(config)
    runs.start(config)
    model = str(clip.TINY_CLIP) if config.smoke else config.model
    found = model_checks.run(config, model, PUBLISHED)
    runs.claim(config)
    bad = [check.name for check in found if check.state == model_checks.FAILED]
    rows = [check._asdict() for check in found]
    results = tables.write(
        config.out,
        f"Check of {config.model}",
        {"Zero-shot accuracies are test accuracies in percent.": rows},
        {"rows": rows, "failed": bad},
        f"Failed: {', '.join(bad)}." if bad else "Nothing failed.",
    )
    if bad:
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    script.run(Config, main)
