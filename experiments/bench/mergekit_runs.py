"""Tiny models, and mergekit's merges of them in its own environment."""

import json
import subprocess
from pathlib import Path
from typing import Any

# One process for all merges: to import mergekit takes longer than to merge.
DRIVER = """
import json, sys, traceback
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

options = MergeOptions(
    copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0
)
errors = {}
for name, (config, out) in json.load(open(sys.argv[1])).items():
    try:
        run_merge(MergeConfiguration.model_validate(config), out, options)
    except Exception as error:
        traceback.print_exc()
        errors[name] = f"{type(error).__name__}: {error}"
json.dump(errors, open(sys.argv[2], "w"))
"""


def make_models(architecture: str, folder: Path) -> list[Path]:
    """A random base and its fine-tunes, in float32, as transformers writes them."""
    import torch
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 64, "dtype": "float32"}
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if architecture == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
    elif architecture == "gpt2":
        gpt2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4}
        gpt2 |= {"n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=64, dtype="float32", **gpt2)
        model = transformers.GPT2LMHeadModel(config)
    elif architecture == "bert":
        # mergekit 0.1.5 fails at a BertModel: it adds a tuple, the other names of the
        # optional position_ids, to a list.
        sizes["num_labels"] = 32
        config = transformers.BertConfig(**sizes)
        model = transformers.BertForTokenClassification(config)
    else:
        del sizes["vocab_size"]
        config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
        model = transformers.CLIPVisionModel(config)
    base = {name: leaf.clone() for name, leaf in model.named_parameters()}
    folders = [folder / architecture / name for name in ("base", "m1", "m2", "m3")]
    with torch.no_grad():
        for target in folders:
            if target != folders[0]:
                for name, leaf in model.named_parameters():
                    leaf.copy_(base[name] + 0.02 * torch.randn_like(leaf))
            model.save_pretrained(target)
    return folders


def run_mergekit(programs: Path, jobs: dict[str, tuple[dict, str]], folder: Path):
    """Merges all; returns what went wrong, by job."""
    asked, answered = folder / "jobs.json", folder / "errors.json"
    asked.write_text(json.dumps(jobs), encoding="utf-8")
    python = programs.absolute() / "python"
    # Its warnings would hide the table; a failed import is shown.
    done = subprocess.run(
        [python, "-c", DRIVER, asked, answered], capture_output=True, text=True
    )
    if done.returncode or not answered.exists():
        raise RuntimeError(f"mergekit did not run by {python}:\n{done.stderr[-2000:]}")
    return json.loads(answered.read_text(encoding="utf-8"))
