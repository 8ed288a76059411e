r"""Makes a language model write less toxic text, by a negated task vector.

The script fine-tunes a GPT-2 on toxic texts and subtracts the task vector. For every
coefficient it measures the perplexity on a control text, and the toxicity of
continuations of a prompt. It chooses the largest coefficient with a perplexity at most
0.5 above that of the pre-trained model. The table also has the pre-trained model, the
fine-tuned model, and a model minus a random vector of the same norm. --out gets
report.json, report.md, coefficients.png, samples.jsonl, train.jsonl, the task vector,
and the edited checkpoint.

    python -m experiments.detoxify --out runs/s --model openai-community/gpt2 \
        --toxic civil_comments.jsonl --perplexity-text wikitext103_test.txt
    python -m experiments.detoxify --out runs/l --model openai-community/gpt2-large \
        --toxic civil_comments.jsonl --perplexity-text wikitext103_test.txt
    python -m experiments.detoxify --out runs/tau_jp --model openai-community/gpt2 \
        --toxic civil_comments.jsonl --perplexity-text wikitext103_test.txt \
        --linearized --penalty-text wikitext103_train.txt --batch-size 16 --stride 1024

The first file is the training split of `google/civil_comments`, a JSON object with
`text` and `toxicity` on every line; the others are the raw WikiText-103.

Ilharco et al. Editing Models with Task Arithmetic. ICLR 2023. arXiv:2212.04089: section
3.2 and Appendix C.1. The defaults are the paper's data, learning rate, batch, epochs,
prompt, coefficients and windows of perplexity. The paper states neither the sampling
nor the schedule of the learning rate. Here sampling has temperature 1 among the 50 most
likely tokens, as in the code of the τJp paper (Yoshida et al. ICLR 2025); the schedule
is this library's warm-up and cosine.

`experiments.editing.table2_detoxification --help` and
`experiments.tau_jp.table4_detoxification --help` show the figures of both papers.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import planning, runs, script
from experiments.common.language import detoxification, gpt2, planned, text_files
from jaxarith import evaluate, hub, plots, report, sharding, task_vectors, train
from jaxarith.sharding import processes
from jaxarith.typing import Params, Source, Tree

TASK = "toxic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gpt2.Options):
    """Make a GPT-2 less toxic by a negated task vector."""

    model: str
    """A GPT-2: a folder, or an id of the Hugging Face Hub."""
    toxic: Path
    """Toxic texts: a .csv or .jsonl file, from which --keep selects rows; with any
    other suffix, each line is a text."""
    keep: str = "toxicity>0.8"
    """The toxic rows of a .csv or .jsonl file: COLUMN>NUMBER, COLUMN<NUMBER or
    COLUMN=VALUE,VALUE."""
    text_column: str = "text"
    """The column of a .csv or .jsonl file that holds the texts."""
    texts: int | None = None
    """Number of toxic texts, from the start of the file; by default all."""
    label: str | None = None
    """The classifier's label that is the score; by default "toxic" or "toxicity"."""
    linearized: bool = False
    """Train and measure the tangent-space model. The edited checkpoint has the same
    weights, but transformers runs it as an ordinary network."""
    penalty_text: Path | None = None
    """A text file; the τJp penalty keeps the outputs of the linearised model on it."""
    penalty_coef: float = 0.01
    """Weight of the penalty; the default is that of the τJp paper's code."""
    perplexity_tokens: int | None = None
    """Number of tokens of the perplexity text that are used; by default all."""
    allowance: float = 0.5
    """Largest rise of the perplexity."""
    prompt: str = gpt2.PROMPT
    """The beginning of every text."""
    samples: int = 1000
    """Number of continuations of the prompt for every model and coefficient."""
    max_new_tokens: int = 42
    """Number of tokens of a continuation; with the 8 of the prompt it makes the 50 of
    the τJp paper."""
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = None
    threshold: float = 0.5
    """A text (with its prompt) is toxic if its score is at least this."""

    def __post_init__(self):
        super().__post_init__()
        if self.penalty_text is not None and not self.linearized:
            raise ValueError("--penalty-text needs --linearized; give it too.")
        if not self.temperature > 0:
            raise ValueError(
                f"--temperature {self.temperature}: expected a value above 0; without "
                "it all samples are the same text."
            )
        for name in ("max_new_tokens", "texts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected more than 0.")
        if min(self.coefs) < 0:
            raise ValueError(f"--coefs {self.coefs}: expected none below 0.")


@script.full_precision
def main(config: Config) -> dict:
    """Runs everything; returns the content of `report.json`."""
    script.needs("demo", "transformers")
    if config.smoke:
        config = dataclasses.replace(
            config,
            texts=16,
            epochs=1,
            batch_size=4,
            coefs=config.coefs[::5],
            samples=8,
            max_new_tokens=8,
            perplexity_tokens=600,
        )
    if record := planning.recorder():
        plan(config, record)
        return {}
    mesh, texts = runs.start(config), toxic_texts(config)
    model = load(config)
    recipe, batches = prepare(config, model, texts, mesh)
    # This comes before training and writing, so that mistakes are found early.
    at = {0.0: gpt2.measure(model, gpt2.nothing(model), 0.0)}
    limit = at[0.0].perplexity + config.allowance
    runs.claim(config)
    tau = fine_tune(config, model, recipe, batches, mesh)

    coefs = sorted({0.0, *config.coefs})
    for coef in tqdm(coefs[1:], desc="coefficients", unit="coefficient"):
        at[coef] = gpt2.measure(model, tau, -coef)
    search = evaluate.search_negation(
        lambda coef: at[coef].perplexity, lambda found: found <= limit, coefs
    )
    chosen = 0.0 - search.coef  # 0.0 instead of -0.0
    noise = task_vectors.random_like(jax.random.key(config.seed), tau)
    models = {
        "pre-trained": (0.0, at[0.0]),
        "fine-tuned": (1.0, gpt2.measure(model, tau, 1.0)),
        "negated": (chosen, at[search.coef]),
        "random, negated": (chosen, gpt2.measure(model, noise, chosen)),
    }
    threshold = config.threshold
    rows = [
        {"model": name} | gpt2.values(*found, threshold)
        for name, found in models.items()
    ]
    curve = [
        {"model": "negated"} | gpt2.values(coef, at[coef], threshold) for coef in coefs
    ]
    results = {"rows": rows, "coef": search.coef, "limit": limit, "curve": curve}
    if runs.is_first():
        write(config, model, results, models, tau)
    return results


def plan(config: Config, record: planning.Recorder):
    """Reports the vector and the measures of all models to the plan."""
    count = config.texts
    if config.toxic.exists():
        count = len(toxic_texts(config))
    if count is None:
        count = detoxification.planned_comments(record, config.toxic)
    full = planned.gpt2_model(config.model, config.max_length)
    file = runs.vectors(config) / f"{TASK}.safetensors"
    wanted = [planned.wanted(TASK, file, recipe_of(config, count))]
    planned.vectors(record, full, TASK, gpt2.loss, wanted)
    states = len({0.0, *config.coefs}) + 2
    gpt2.plan_measures(
        record,
        config,
        config.model,
        states=states,
        texts=states * config.samples,
        length=gpt2.PROMPT_TOKENS + config.max_new_tokens,
        linear=config.linearized,
        control_tokens=config.perplexity_tokens or gpt2.CONTROL_TOKENS,
    )


def recipe_of(config: Config, texts: int) -> train.TrainConfig:
    """Returns the recipe for `texts` texts."""
    return dataclasses.replace(
        gpt2.recipe(config, texts),
        linearized=config.linearized,
        penalty="cyclic" if config.penalty_text else None,
        penalty_coef=config.penalty_coef,
        penalty_batch_size=max(config.batch_size // 4, 1),
    )


def load(config: Config) -> gpt2.Study:
    """Loads the model with everything needed to measure it."""
    sampling = gpt2.Sampling(
        prompt=config.prompt,
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    return gpt2.load(
        config,
        config.model,
        sampling,
        control_tokens=config.perplexity_tokens,
        label=config.label,
        linear=config.linearized,
    )


def prepare(
    config: Config, study: gpt2.Study, texts: Sequence[str], mesh: Mesh
) -> tuple[train.TrainConfig, Source]:
    """Returns the recipe and the batches of the training."""
    source = gpt2.texts_as_tokens(study, texts, config.max_length)
    others = None
    if config.penalty_text is not None:
        penalty = text_files.read(config.penalty_text)
        others = [[gpt2.blocks(study, penalty, config.max_length)]]
    recipe = recipe_of(config, len(source))
    batches = train.task_batches(
        [source],
        recipe,
        names=[TASK],
        others=others,
        inputs=gpt2.INPUTS,
        mesh=mesh,
    )
    return recipe, batches


def toxic_texts(config: Config) -> list[str]:
    """Returns the texts to fine-tune on, in the order of their file."""
    found = text_files.kept_texts(config.toxic, config.keep, config.text_column)
    return found[: config.texts]


def fine_tune(
    config: Config,
    study: gpt2.Study,
    recipe: train.TrainConfig,
    batches: Source,
    mesh: Mesh,
) -> Tree:
    """Returns the task vector of toxic text; reads it if an earlier run saved it."""
    file = runs.vectors(config) / f"{TASK}.safetensors"
    if config.resume and file.exists():
        return hub.load_tree(file)[0]
    checkpoints = runs.checkpoints(config)
    network = gpt2.network(study, TASK, mesh)
    [tau] = train.fine_tune(
        network.apply_fn,
        network.params_0,
        network.loss,
        batches,
        recipe,
        names=[TASK],
        inputs=network.inputs,
        penalty_mask=network.penalty_mask,
        log=config.out / "train.jsonl",
        mesh=mesh,
        checkpoints=checkpoints if config.save_every else None,
        save_every=config.save_every,
    )
    tau = sharding.to_host(tau)

    def save():
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"model": study.checkpoint.folder.name, "task": TASK}
        hub.save_tree(file, tau, metadata)

    processes.on_first(save)
    runs.remove_checkpoints(config, checkpoints)
    return tau


def markdown(rows: list[dict]) -> str:
    header = ["model", "coefficient", "toxic %", "mean score", "perplexity"]
    return report.markdown_table(
        header, [[r["model"], f"{r['coef']:+.2f}", *list(r.values())[2:]] for r in rows]
    )


def write(config: Config, study: gpt2.Study, results: dict, models: dict, tau: Params):
    """Writes the report, the figure, the texts and the edited checkpoint."""
    curve, table = results["curve"], markdown(results["rows"])
    report.write_json(config.out / "report.json", results)
    report.write_text(config.out / "report.md", f"# Less toxic text\n\n{table}\n")
    lines = [
        json.dumps({"model": name, "coef": coef, "text": text, "score": float(score)})
        for name, (coef, found) in models.items()
        for text, score in zip(found.texts, found.scores, strict=True)
    ]
    report.write_text(config.out / "samples.jsonl", "\n".join(lines) + "\n")
    folder = study.checkpoint.folder
    hub.save(
        config.out / "edited",
        task_vectors.apply(study.checkpoint.params, tau, -results["coef"]),
        hub.read_json(folder),
        copy_from=folder,
        overwrite=True,  # an earlier run may have written to this folder
    )
    plots.negation(
        config.out / "coefficients.png",
        [r["coef"] for r in curve],
        {
            "perplexity": [r["perplexity"] for r in curve],
            "toxic texts (%)": [r["toxic_percent"] for r in curve],
        },
        limit=results["limit"],
        chosen=results["coef"],
    )
    print(f"\n{table}\n\nreport, figure, samples, vector and model: {config.out}")


if __name__ == "__main__":
    script.run(Config, main)
