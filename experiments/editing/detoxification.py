"""What the scripts on toxic text of GPT-2 share: the texts, the models, the vectors.

The vectors are trained as `experiments.detoxify` does it, whose machinery this is, and
lie in the bank: `toxic`, of comments with toxicity above 0.8; `toxic_ascent`, of the
same texts by gradient ascent; `non_toxic`, of comments with toxicity below 0.2.

The two files of text:

    pip install -e '.[text]'
    python - <<'END'
    from datasets import concatenate_datasets, load_dataset
    comments = load_dataset("google/civil_comments", split="train")
    toxic = comments.filter(lambda row: row["toxicity"] > 0.8)
    others = comments.filter(lambda row: row["toxicity"] < 0.2).shuffle(seed=0)
    kept = concatenate_datasets([toxic, others.select(range(len(toxic)))])
    kept.to_json("civil_comments.jsonl")
    wiki = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="test")
    with open("wikitext103_test.txt", "w", encoding="utf-8") as file:
        file.write("\n\n".join(wiki["text"]))
    END

What the paper leaves open:

- The schedule of the learning rate: this library's warm-up and cosine. Weight decay and
  clipping are the library's too, 0.1 and norm 1.
- The length of a comment: 128 tokens; the padding of shorter ones does not count.
- How many comments that are not toxic: at most as many as toxic ones.
- Gradient ascent is the same training with the sign of the loss changed.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from experiments import detoxify
from experiments.common import bank, runs
from experiments.common.language import tiny_text
from jaxarith import fingerprint, train
from jaxarith.data import language
from jaxarith.sharding import processes
from jaxarith.typing import Params, Tree

METHOD = "editing"  # the folder of the bank
KINDS = ("toxic", "toxic_ascent", "non_toxic")
SIZES = {
    "openai-community/gpt2-large": "GPT-2 Large",
    "openai-community/gpt2-medium": "GPT-2 Medium",
    "openai-community/gpt2": "GPT-2 Small",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """The options of all scripts on toxic text."""

    bank: Path = Path("bank")
    """Folder of task vectors, which all scripts share: what is there is not trained
    again."""
    models: tuple[str, ...] = tuple(SIZES)
    """GPT-2s: folders, or ids of the Hugging Face Hub."""
    classifier: str = "unitary/toxic-bert"
    """What scores texts, Detoxify's "original": a folder, or an id of the Hub."""
    comments: Path = Path("civil_comments.jsonl")
    """Comments, an object with text and toxicity per line."""
    perplexity_text: Path = Path("wikitext103_test.txt")
    """The text of which the perplexity is measured."""
    epochs: float = 5
    batch_size: int = 32
    micro_batches: int = 1
    """Into how many parts a batch is cut, for less memory."""
    learning_rate: float = 1e-5
    max_length: int = 128
    """Tokens of a comment; longer ones lose their end."""
    window: int = 1024
    """Tokens of a window of perplexity."""
    stride: int = 512
    """Tokens between windows of perplexity."""
    coefs: tuple[float, ...] = tuple(i / 10 for i in range(11))
    """The candidates of the coefficient of the negated vector."""
    seed: int = 0
    smoke: bool = False
    """Run the whole path in seconds, with tiny models and made-up texts; what it finds
    means nothing."""


class Study(NamedTuple):
    """One GPT-2 and its task vectors.

    Attributes:
      config: the options of the script.
      name: of the model.
      model: its folder or id.
      options: those of `detoxify`.
      texts: of every kind of vector, what `detoxify` trains and measures with.
      fingerprint: of the GPT-2's parameters.
      banked: by kind, the task vector that the bank has; None where it has not.
    """

    config: Options
    name: str
    model: str
    options: detoxify.Config
    texts: dict[str, detoxify.Study]
    fingerprint: int
    banked: dict

    @property
    def toxic(self) -> detoxify.Study:
        return self.texts["toxic"]


def smoke(config: Options) -> Options:
    """The options of a smoke run, where it is one."""
    if not config.smoke:
        return config
    return dataclasses.replace(
        config,
        **dict(models=("tiny_gpt2",), epochs=1, batch_size=8, learning_rate=1e-2),
        **dict(max_length=24, window=64, stride=32, coefs=(0.0, 0.1, 1.0)),
        **dict(save_every=0, mesh="data=1"),
    )


def start(config: Options, kinds: tuple[str, ...], **sampling) -> list[Study]:
    """Loads and checks everything, and claims the folder.

    Args:
      kinds: of `KINDS`, the vectors that the script needs.
      sampling: options of `detoxify` on the texts that are written.
    """
    if not config.models:
        raise ValueError("no --models; name at least one GPT-2.")
    runs.start(config)
    studies = [load(config, model, kinds, sampling) for model in config.models]
    runs.claim(config)
    return studies


def load(config: Options, model: str, kinds: tuple[str, ...], sampling: dict) -> Study:
    """One GPT-2, and what the bank has of its vectors.

    Raises:
      ValueError: the comments have no column that says which are toxic.
    """
    if not config.smoke and config.comments.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(
            f"--comments {config.comments}: expected a .csv or .jsonl with text and "
            "toxicity."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = dict(
            model=model,
            classifier=config.classifier,
            toxic=config.comments,
            perplexity_text=config.perplexity_text,
        )
        if config.smoke:
            files = tiny_text.write_comments(folder)
            places = dict(
                model=str(tiny_text.write_gpt2(folder / model, n_inner=16)),
                classifier=str(tiny_text.write_classifier(folder / "classifier")),
                toxic=files["comments"],
                perplexity_text=files["perplexity_text"],
            )
        options = detoxify.Config(
            out=config.out,
            mesh=config.mesh,
            save_every=config.save_every,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            max_length=config.max_length,
            window=config.window,
            stride=config.stride,
            seed=config.seed,
            **places,
            **sampling,
        )
        toxic = detoxify.prepare(options)
        texts = dict.fromkeys(kinds, toxic)
        if "non_toxic" in kinds:
            kind = dataclasses.replace(
                options, keep="toxicity<0.2", texts=len(toxic.source)
            )
            source = language.encode(
                toxic.tokenizer, detoxify.toxic_texts(kind), config.max_length
            )
            texts["non_toxic"] = toxic._replace(source=source)
    study = Study(
        config=config,
        name=SIZES.get(model, model),
        model=model,
        options=options,
        texts={"toxic": toxic, **texts},
        fingerprint=fingerprint.combined(toxic.checkpoint.params),
        banked={},
    )
    for kind in kinds:
        study.banked[kind] = bank.read(file_of(study, kind), identity(study, kind))
        # A wrong mesh shows here.
        detoxify.batches_of(options, texts[kind], recipe_of(study, kind))
    return study


def recipe_of(study: Study, kind: str) -> train.TrainConfig:
    recipe = detoxify.recipe_of(study.options, len(study.texts[kind].source))
    return dataclasses.replace(recipe, micro_batches=study.config.micro_batches)


def file_of(study: Study, kind: str) -> Path:
    return bank.vector_file(study.config.bank, study.model, METHOD, kind)


def identity(study: Study, kind: str) -> dict:
    """What a task vector in the bank must have been trained with."""
    return {
        "method": METHOD,
        "ascent": kind == "toxic_ascent",
        "recipe": bank.plain_recipe(recipe_of(study, kind)),
        "params_0": study.fingerprint,
        "max_length": study.config.max_length,
        "samples": bank.checksum(study.texts[kind].source),
    }


def vector(study: Study, kind: str) -> Tree:
    """A task vector, which is trained where the bank has it not."""
    if study.banked[kind] is not None:
        return study.banked[kind]
    config, label = study.config, f"{kind}_{Path(study.model).name}"
    checkpoints = runs.checkpoints(config) / label
    tau = detoxify.trained(
        study.options,
        study.texts[kind],
        recipe_of(study, kind),
        log=config.out / f"train_{label}.jsonl",
        checkpoints=checkpoints,
        ascent=kind == "toxic_ascent",
    )

    def save():
        bank.write(file_of(study, kind), tau, identity(study, kind), {})
        shutil.rmtree(checkpoints, ignore_errors=True)

    processes.on_first(save)
    return tau


def perplexity(study: Study, tau: Params, coef: float) -> float:
    """The perplexity of the model moved by `coef` times the vector."""
    state = study.toxic.model.moved(tau, coef)
    return detoxify.perplexity_of(study.options, study.toxic, state)
