"""`steersman chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from steersman.config.sections import Section, key_names
from steersman.data import DataConfig, Layout, layout, template_ends
from steersman.data.template import UNTAUGHT_STOP
from steersman.guards.terminal import printable
from steersman.guards.untrusted import without_half_pairs
from steersman.jsonl import append_jsonl
from steersman.model import Policy, context_length
from steersman.model.probe import cache_argument
from steersman.recipe.sections import TRAINED_ONLY, ModelConfig
from steersman.rollout import Sampling
from steersman.rollout.engine import end_ids
from steersman.rollout.sampling import draw, restrict, uniforms
from steersman.run.run_config import KEPT_ONLY, RunConfig, device_of
from steersman.setup.models import policy_from
from steersman.types import SteersmanError

COMMANDS = """/reset          forget the conversation (the system prompt stays)
/system TEXT    another system prompt, and a new conversation; without text: none
/set KEY VALUE  temperature, top_p, top_k, min_p or max_new_tokens
/save FILE      add the conversation to a JSONL file, as a row that sft reads
/help           this list
Ctrl-C stops an answer, Ctrl-D or /quit leaves."""


class ChatSampling(Section):
    """How an answer is drawn."""

    max_new_tokens: int = Field(default=512, ge=1, description="longest answer, in tokens")
    temperature: float = Field(default=0.7, ge=0, description="logits are divided by it; 0: the likeliest token")
    top_k: int = Field(default=0, ge=0, description="sample among the k likeliest tokens; 0 is off")
    top_p: float = Field(default=0.95, gt=0, le=1, description="sample from the smallest set of this mass; 1 is off")
    min_p: float = Field(default=0.0, ge=0, le=1, description="drop tokens below this share of the likeliest")


class ChatRecipe(Section):
    """A conversation with a model in the terminal."""

    model: ModelConfig
    system: str = Field(default="", description="system prompt; empty: none but what the template itself writes")
    sampling: ChatSampling = ChatSampling()
    run: RunConfig = RunConfig()

    @classmethod
    def unread_keys(cls) -> frozenset[str]:
        return key_names(model=TRAINED_ONLY, run=KEPT_ONLY)


def run(recipe: ChatRecipe) -> dict[str, Any]:
    """Talks until the input ends; returns how many answers were given."""
    policy = policy_from(recipe.model, recipe.run, device_of(recipe.run), trainable=False)
    chat = Chat(policy, recipe)
    print(printable(f"{recipe.model.path}, laid out by {chat.layout.template.sentence}. /help lists the commands."))
    with suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() a history and editing
    while True:
        try:
            line = without_half_pairs(input("> "))  # what bytes become that are no text of the terminal's
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        except UnicodeDecodeError as error:
            print(f"(the terminal sent bytes that are not {error.encoding}; say it again)")
            continue
        except EOFError:
            print()
            return {"answers": chat.answers}
        if line.strip() in ("/quit", "/exit"):
            return {"answers": chat.answers}
        try:
            print(printable(chat.command(line))) if line.startswith("/") else chat.say(line)
        except SteersmanError as error:
            print(printable(f"({error})"))


class Chat:
    """The conversation so far, and the model that answers it."""

    def __init__(self, policy: Policy, recipe: ChatRecipe) -> None:
        if policy.decoder_start:
            raise SteersmanError(f"{recipe.model.path}: an encoder-decoder holds no conversation; use generate")
        self.policy, self.seed, self.system = policy, recipe.run.seed, recipe.system
        self.sampling = recipe.sampling
        self.layout: Layout = layout(policy, DataConfig(path="chat"))
        self.ends = end_ids(policy.model, policy.tokenizer, also=template_ends(policy.tokenizer))
        self.turns: list[Any] = []
        self.answers = 0

    @property
    def messages(self) -> list[Any]:
        """The whole conversation, the system prompt first."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else self.turns

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash asks for; returns what to print."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name == "reset":
            self.turns = []
            return "(forgotten)"
        if name == "system":
            self.system, self.turns = rest, []
            return "(a new conversation with this system prompt)" if rest else "(a new conversation without one)"
        if name == "set":
            return self._set(*rest.partition(" ")[::2])
        if name == "save":
            return self._save(rest)
        return COMMANDS

    def say(self, text: str) -> None:
        """Prints the answer to a user's turn as it is drawn; Ctrl-C keeps what was said so far."""
        if not text.strip():
            return
        self.turns.append({"role": "user", "content": text})
        said = ""
        try:
            ids = self._prompt()
            for piece in self._stream(ids):
                said += piece
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        except SteersmanError:
            self.turns.pop()
            raise
        print()
        self.answers += 1
        self.turns.append({"role": "assistant", "content": said})

    def _prompt(self) -> list[int]:
        """Ids of the conversation; its oldest exchanges are left out where the context is too small."""
        context, left_out = context_length(self.policy.model), 0
        while True:
            ids, _ = self.layout.prompt(self.messages)
            room = None if context is None else context - len(ids)
            if room is None or room >= min(self.sampling.max_new_tokens, context // 4 if context else 1):
                break
            if len(self.turns) < 3:
                raise SteersmanError(f"the context of {context} tokens is too small for this; say it shorter")
            self.turns, left_out = self.turns[2:], left_out + 1
        if left_out:
            print(f"(the context is full: the oldest {left_out} exchanges are forgotten)")
        return ids

    @torch.no_grad()
    def _stream(self, ids: list[int]) -> Iterator[str]:
        """The answer in pieces of text, token by token; a character whose bytes are not whole yet is held back."""
        model, decode = self.policy.model, self.layout.codec.decode
        stop = "" if self.layout.template.own else UNTAUGHT_STOP
        context, sampling = context_length(model), Sampling(**self.sampling.model_dump())
        count = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
        numbers = torch.from_numpy(uniforms(self.seed, self.answers, 0, 0, count))
        cache_name = cache_argument(type(model))
        new, shown, cache, feed = [], "", None, torch.tensor([ids])
        for i in range(count):
            out = model(input_ids=feed.to(self.policy.device), use_cache=True, **{cache_name: cache})
            cache = out[cache_name]
            uniform = None if sampling.greedy else numbers[i : i + 1].to(self.policy.device)
            token, _ = draw(restrict(out.logits[:, -1], sampling), uniform)
            if int(token) in self.ends:
                break
            new.append(int(token))
            feed = token[None]
            text = decode(new)
            if stop and stop in text:
                yield text[len(shown) : text.index(stop)]
                return
            if not text.endswith("\ufffd") and not (stop and _opens(text, stop)):
                yield text[len(shown) :]
                shown = text
        yield decode(new)[len(shown) :]

    def _set(self, key: str, value: str) -> str:
        if key not in ChatSampling.model_fields:
            return f"(/set knows {', '.join(ChatSampling.model_fields)})"
        try:
            self.sampling = ChatSampling.model_validate({**self.sampling.model_dump(), key: value.strip()})
        except ValueError as error:
            return f"({key}: {str(error).splitlines()[2].strip()})"
        return f"({key} is {getattr(self.sampling, key)})"

    def _save(self, name: str) -> str:
        if not name or not self.turns:
            return "(write /save FILE.jsonl)" if self.turns else "(nothing was said yet)"
        path = Path(name).expanduser()
        append_jsonl(path, {"messages": self.messages})
        return f"(saved to {path})"


def _opens(text: str, stop: str) -> bool:
    """Whether the text ends in a beginning of the stop string."""
    return any(text.endswith(stop[:n]) for n in range(1, len(stop)))
