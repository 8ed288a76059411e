"""A user's script, which pyright must accept: fine-tune, merge, search, stream."""

import functools
import sys
from pathlib import Path

import jax
import numpy as np

from jaxarith import evaluate, hub, losses, merge, stream, tangent, train, tree
from jaxarith.data import pipeline, vision
from jaxarith.models import clip, heads


def loss(outputs: jax.Array, batch: dict, head: dict) -> jax.Array:
    logits = heads.logits(head["head"], outputs, head["valid"])
    return losses.cross_entropy(logits, batch["label"])


def main(folders: list[str], out: Path) -> None:
    model = clip.load(hub.find("openai/clip-vit-base-patch32"))
    params_0 = tree.select(model.params, clip.IMAGE_ENCODER)
    encode = clip.image_encoder(model.config)
    tasks = [vision.load_folder(Path(folder).name, folder) for folder in folders]
    names = [task.name for task in tasks]
    each = [clip.zero_shot_head(model, t.classes, t.templates) for t in tasks]
    config = train.TrainConfig(steps=200, linearized=True, penalty="cyclic")
    seeds = [train.seed_of(name, config.seed) for name in names]
    batches = train.task_batches([task.train for task in tasks], config, seeds=seeds)
    head = heads.pad(each)
    taus = train.fine_tune(
        encode, params_0, loss, batches, config, names=names, constants=head
    )

    merge.task_arithmetic(params_0, taus, coef=0.3)
    merge.awd(params_0, taus, coef=[0.3, 0.5], solver="direct")
    merge.topk(params_0, taus, coef=lambda path: 0.5 if "mlp" in path else 0.2)
    by_path = {path: 0.4 for path in tree.flatten(taus[0])}
    merged = merge.ties(params_0, taus, preset="official", density=0.3, coef=by_path)
    lin = tangent.linearize(encode, params_0, product_dtype="bfloat16")

    def accuracies_at(coef: float) -> list[float]:
        params = merge.task_arithmetic(params_0, taus, coef=coef)
        samples = [pipeline.evaluation_batches(task.validation, 64) for task in tasks]
        found = [evaluate.outputs(lin, params, some) for some in samples]
        return [float(np.mean(outputs.argmax(-1))) for outputs in found]

    best = evaluate.search(accuracies_at, [0.9] * len(tasks), np.linspace(0, 1, 11))
    print(f"the best coefficient is {best.coef:.2f}")
    hub.save(out / "mine", tree.update(model.params, merged), {"model_type": "clip"})
    opened = stream.open_models(out / "base", [out / name for name in names])
    method = functools.partial(merge.ties, preset="adamerging", coef=best.coef)
    stream.merge(method, opened, out / "large", dtype="bfloat16")


if __name__ == "__main__":
    main(sys.argv[1:], Path("runs"))
