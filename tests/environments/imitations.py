"""Chat templates that imitate well-known ones, and tokenizers and models that have them."""

from __future__ import annotations

from pathlib import Path

import torch
from letter_models import LETTERS, letters
from tiny_models import tiny_model
from tokenizers import Regex, pre_tokenizers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' "
    "else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + "
    "'</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.tool_calls %}"
    "{% for t in m.tool_calls %}{{ '<tool_call>' + (t.function | tojson) + '</tool_call>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}"
    "{{ '[TOOLS]' + (tools | tojson) }}{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{% if m.tool_calls %}{% set ns = namespace(all=[]) %}"
    "{% for t in m.tool_calls %}{% set ns.all = ns.all + [t.function] %}{% endfor %}"
    "{{ '[TOOL_CALLS] ' + (ns.all | tojson) + eos_token }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and "
    "loop.index0 < ns.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
FIVE = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3, "r1": R1}
"""One that adds nothing, one that trims, one that wants turns by turns, and two that drop thoughts, the last of which
opens one for the model."""


def tokenizer_of(template: str):
    """One token per letter, line breaks and what marks thoughts included."""
    made = letters(vocabulary=[*LETTERS, "<", "/", ">"])
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def save_chat(folder: Path, template: str) -> Path:
    """A random Llama whose tokenizer has the template; what it likes best to say is no control token."""
    tokenizer = tokenizer_of(template)
    model = tiny_model("llama", vocab=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
