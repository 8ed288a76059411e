r"""Shared code of the scripts on toxic text: texts, GPT-2s, and vectors in the bank.

These commands make the texts. The τJp paper's script reads
`wikitext103_test_lines.txt`, and a tenth of the training part of WikiText-103, which is
more than a run needs:

    pip install -e '.[text]'
    python - <<'END'
    from datasets import concatenate_datasets, load_dataset
    comments = load_dataset("google/civil_comments", split="train")
    toxic = comments.filter(lambda row: row["toxicity"] > 0.8)
    others = comments.filter(lambda row: row["toxicity"] < 0.2).shuffle(seed=0)
    kept = concatenate_datasets([toxic, others.select(range(len(toxic)))])
    kept.to_json("civil_comments.jsonl")
    for split, name, between in (
        ("test", "test", "\n\n"),
        ("test", "test_lines", ""),
        ("train[:10%]", "train", ""),
    ):
        wiki = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split=split)
        with open(f"wikitext103_{name}.txt", "w", encoding="utf-8") as file:
            file.write(between.join(wiki["text"]))
    END

The bank has three vectors for the editing paper. `toxic` is trained on comments with
toxicity above 0.8, `toxic_ascent` on the same texts by gradient ascent, and `non_toxic`
on comments with toxicity below 0.2. The paper leaves the following open; our choices
are:

- The schedule of the learning rate is this library's warm-up and cosine. Weight decay
  and clipping are the library's too, 0.1 and norm 1.
- A comment has at most 128 tokens; padding is not counted in the loss.
- There are at most as many non-toxic comments as toxic ones.
- Gradient ascent is the same training with the sign of the loss changed.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jax.sharding import Mesh

from experiments.common import bank, planning, runs, script, training
from experiments.common.language import gpt2, planned, text_files, tiny_text
from jaxarith import fingerprint
from jaxarith.typing import Params, Tree

METHOD = "editing"  # the folder of the bank
KINDS = ("toxic", "toxic_ascent", "non_toxic")
TOXIC, NON_TOXIC = "toxicity>0.8", "toxicity<0.2"
SIZES = {
    "openai-community/gpt2-large": "GPT-2 Large",
    "openai-community/gpt2-medium": "GPT-2 Medium",
    "openai-community/gpt2": "GPT-2 Small",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(gpt2.Options, runs.Banked):
    """Options of all scripts on toxic text."""

    comments: Path = Path("civil_comments.jsonl")
    """A .jsonl or .csv file of comments with the fields text and toxicity. Comments
    with toxicity above 0.8 are toxic."""
    perplexity_text: Path = Path("wikitext103_test.txt")
    """The text file whose perplexity is measured."""


C = TypeVar("C", bound=Options)


@contextlib.contextmanager
def places(options: C, model: str) -> Iterator[tuple[C, str]]:
    """Yields the options and the model; a smoke run gets temporary made-up files."""
    if not options.smoke:
        yield options, model
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = tiny_text.write_comments(folder)
        chosen: dict = {k: v for k, v in files.items() if hasattr(options, k)}
        classifier = str(tiny_text.write_classifier(folder / "classifier"))
        tiny = str(tiny_text.write_gpt2(folder / model, n_inner=16))
        yield dataclasses.replace(options, classifier=classifier, **chosen), tiny


# The editing paper: several GPT-2s, with three vectors each.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditingOptions(Options):
    """Options of the editing paper's scripts on toxic text."""

    models: tuple[str, ...] = tuple(SIZES)
    """GPT-2s: folders, or ids of the Hugging Face Hub."""
    micro_batches: int = 1
    """Number of parts of a batch that are computed one after another. More parts need
    less memory."""


E = TypeVar("E", bound=EditingOptions)


def smoke(config: E, **small: Any) -> E:
    """Returns the options; in a smoke run with small values, and those of `small`."""
    common: dict[str, Any] = {"models": ("tiny_gpt2",), "epochs": 1, "batch_size": 8}
    common |= {"learning_rate": 1e-2, "max_length": 24, "coefs": (0.0, 0.1, 1.0)}
    return runs.smaller(config, **common | small)


# The number of toxic comments that a plan assumes without a file.
COMMENTS = 20_000


def planned_comments(record: planning.Recorder, file: Path) -> int:
    """Returns the number of toxic comments: from the file, or an assumed number."""
    if file.exists():
        return len(text_files.kept_texts(file, TOXIC))
    record.note(
        f"{file} was not found: {COMMENTS} toxic comments are assumed. The number of "
        "steps is proportional to it."
    )
    return COMMENTS


def plan_vectors(
    record: planning.Recorder, config: EditingOptions, kinds: tuple[str, ...]
):
    """Reports the vectors of every GPT-2 to the plan; see `start`."""
    comments = planned_comments(record, config.comments)
    recipe = gpt2.recipe(config, comments, micro_batches=config.micro_batches)
    for model in config.models:
        full = planned.gpt2_model(model, config.max_length)
        for kind in kinds:
            file = bank.vector_file(config.bank, model, METHOD, kind)
            one = planned.wanted(kind, file, recipe)
            planned.vectors(record, full, METHOD, gpt2.loss, [one])


class Study(NamedTuple):
    """One GPT-2 and its task vectors.

    Attributes:
      config: the options of the script.
      name: name of the model.
      gpt2: the model and its measures.
      networks: by kind of vector, the network that is trained.
      wanted: by kind of vector, the description of the training.
    """

    config: EditingOptions
    name: str
    gpt2: gpt2.Study
    networks: dict[str, training.Network]
    wanted: dict[str, training.Wanted]


def start(
    config: EditingOptions, kinds: tuple[str, ...], sampling: gpt2.Sampling
) -> list[Study]:
    """Loads and checks everything, and claims the output folder.

    Args:
      config: the options of the script.
      kinds: the vectors that the script needs, out of `KINDS`.
      sampling: how texts are drawn.

    Raises:
      ValueError: a model is wrong, the comments lack text or toxicity, or the bank has
        vectors with another configuration.
    """
    script.needs("demo", "transformers")
    if config.comments.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(
            f"--comments {config.comments}: expected a .csv or .jsonl file with the "
            "fields text and toxicity."
        )
    mesh = runs.start(config)
    studies = [_load(config, mesh, model, kinds, sampling) for model in config.models]
    runs.claim(config)
    return studies


def _load(config, mesh: Mesh, model: str, kinds, sampling) -> Study:
    with places(config, model) as (files, checkpoint):
        texts = {"toxic": text_files.kept_texts(files.comments, TOXIC)}
        if "non_toxic" in kinds:
            others = text_files.kept_texts(files.comments, NON_TOXIC)
            texts["non_toxic"] = others[: len(texts["toxic"])]
        loaded = gpt2.load(files, checkpoint, sampling)
    base = fingerprint.combined(loaded.checkpoint.params)
    networks, wanted = {}, {}
    for kind in kinds:
        # Gradient ascent uses the same samples in the same order.
        ascent, task = kind == "toxic_ascent", kind.removesuffix("_ascent")
        source = gpt2.texts_as_tokens(loaded, texts[task], config.max_length)
        title = f"{Path(model).name}_{METHOD}" + ascent * "_ascent"
        networks[kind] = gpt2.network(loaded, title, mesh, ascent=ascent)
        wanted[kind] = training.Wanted(
            name=task,
            file=bank.vector_file(config.bank, model, METHOD, kind),
            recipe=gpt2.recipe(config, len(source), micro_batches=config.micro_batches),
            identity={
                "method": METHOD,
                "ascent": ascent,
                "params_0": base,
                "max_length": config.max_length,
                "samples": bank.checksum(source),
            },
            source=source,
        )
        training.check(networks[kind], [wanted[kind]])
    return Study(config, SIZES.get(model, model), loaded, networks, wanted)


def vector(study: Study, kind: str) -> Tree:
    """Returns a task vector; trains it if the bank lacks it."""
    wanted = [study.wanted[kind]]
    [tau] = training.vectors(study.config, study.networks[kind], wanted)
    return tau


def perplexity(study: Study, tau: Params, coef: float) -> float:
    """Returns the perplexity of the model moved by `coef` times the vector."""
    return gpt2.perplexity_of(study.gpt2, study.gpt2.model.moved(tau, coef))
