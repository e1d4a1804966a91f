"""The chat templates that `chat_template: NAME` writes give the texts that mergekit's of these names give.

usage: python chat_templates_are_mergekits.py   (needs jinja2, mergekit==0.1.5)
"""

import importlib.resources
import itertools
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from mergekit._data import chat_templates

OURS = Path(__file__).parents[2] / "crates/modl-aggregate/src/mergekit/templates"
WORDS = ["be kind", " hello\n", "two\n\nlines", ""]


class Refused(Exception):
    """What a template raises."""


def refuse(message):
    raise Refused(message)


def rendered(template, messages, prompt, trim):
    env = ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    env.globals["raise_exception"] = refuse
    try:
        return env.from_string(template).render(
            messages=messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
        )
    except Refused:
        return Refused


theirs = importlib.resources.files(chat_templates)
names = sorted(p.name for p in theirs.iterdir() if p.name.endswith(".jinja"))
assert names == sorted(p.name for p in OURS.glob("*.jinja")), names
count = 0
for name in names:
    own, other = (OURS / name).read_text(), theirs.joinpath(name).read_text()
    roles = ["system", "user", "assistant"] + (["user_context"] if name == "alpaca.jinja" else [])
    for n in (1, 2, 3, 4):
        for chosen in itertools.product(roles, repeat=n):
            # mergekit's Alpaca puts nothing between a message and one that it leaves out.
            if name == "alpaca.jinja" and "system" in chosen[1:]:
                continue
            messages = [{"role": r, "content": WORDS[i % 4]} for i, r in enumerate(chosen)]
            for prompt in (False, True):
                # transformers trims blocks.
                wanted = rendered(other, messages, prompt, True)
                found = rendered(own, messages, prompt, True)
                assert found == wanted, (name, messages, prompt, found, wanted)
                count += 1
print(count, "conversations, the same texts")
