"""The chat templates that files name, rendered as transformers renders them."""

import pytest

from jaxarith.commands.merge.chat_templates import NAMED

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Bye"},
]
SYSTEM = {"role": "system", "content": "Be brief"}
EXPECTED = {
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n",
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "alpaca": (
        "### Instruction:\nHi\n\n### Response:\nYes\n\n### Instruction:\nBye\n\n",
        "Be brief\n\n### Instruction:\nHi\n\n",
        "### Response:\n",
    ),
    "mistral": (
        "<s>[INST] Hi [/INST] Yes</s>[INST] Bye [/INST]",
        "<s>[INST] Be brief\n\nHi [/INST]",
        "",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yes[|endofturn|]\n"
        "[|user|]Bye\n",
        "[|system|]Be brief[|endofturn|]\n[|user|]Hi\n",
        "[|assistant|]",
    ),
}


def rendered(name, messages, prompt=False):
    jinja2 = pytest.importorskip("jinja2")
    settings = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return settings.from_string(NAMED[name]).render(
        messages=messages,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )


def test_all_names_are_rendered_here():
    assert NAMED.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", NAMED)
def test_a_talk_is_written_as_the_model_was_trained(name):
    talk, with_system, prompt = EXPECTED[name]
    assert rendered(name, TALK) == talk
    assert rendered(name, TALK, prompt=True) == talk + prompt
    assert rendered(name, [SYSTEM, TALK[0]]) == with_system
