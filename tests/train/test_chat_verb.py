"""`steersman chat` in a real terminal, on a tiny model: turns, commands, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time

import pytest
import torch
from letter_models import letters, rows_of, save_chat_mini
from transformers import AutoModelForCausalLM

from steersman.cli import main

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a {{ m.content }}</s>{% else %}{{ m.role[0] }} "
    "{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat_mini(tmp_path_factory.mktemp("chat"), 4096, TEMPLATE)


class Terminal:
    """A child process on a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # the child becomes the program
            os.environ["OMP_NUM_THREADS"] = "1"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job begins by ignoring it
            os.execv(sys.executable, [sys.executable, "-m", "steersman", "chat", *args])
        self.read = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What came up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.read:
            assert self.more(end - time.monotonic()), f"{text!r} did not come: {self.read!r}"
        found, _, self.read = self.read.partition(text)
        return found + text

    def more(self, seconds: float) -> bool:
        """Reads what there is, waiting for it; False where nothing came in time or the other side is closed."""
        if not select.select([self.fd], [], [], max(0.0, seconds))[0]:
            return False
        try:
            self.read += os.read(self.fd, 65536).decode(errors="replace").replace("\r\n", "\n")
        except OSError:
            return False
        return True

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def leave(self) -> int:
        """The exit code after Ctrl-D at the prompt: before the prompt stands, the terminal would swallow the key."""
        self.until("> ")
        self.send("\x04")
        end = time.monotonic() + 60
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"Ctrl-D did not end it: {self.read!r}")
            self.more(0.1)


def greedy(folder, text: str, count: int) -> str:
    net, tokenizer = AutoModelForCausalLM.from_pretrained(folder), letters()
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = len(ids)
    while len(ids) < start + count:
        with torch.no_grad():
            token = int(net(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 2:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_conversation(model, tmp_path):
    saved = tmp_path / "talk.jsonl"
    talk = Terminal(str(model), "--sampling.temperature", "0", "--sampling.max_new_tokens", "8", "--system", "be")
    talk.until("chat template. /help lists the commands.\n> ")
    talk.send("hm\n")
    talk.until("hm\n")
    first = greedy(model, "s be\nu hm\na ", 8)
    assert talk.until("> ") == f"{first}\n> "
    talk.send("oh\n")
    talk.until("oh\n")
    second = greedy(model, f"s be\nu hm\na {first}", 0) + greedy_after(model, first)
    assert talk.until("> ") == f"{second}\n> ", "the answer follows the whole conversation"
    talk.send(f"/save {saved}\n")
    talk.until("(saved to")
    talk.until("> ")
    contents = ["be", "hm", first, "oh", second]
    assert [m["content"] for m in rows_of(saved)[0]["messages"]] == contents
    talk.send("/system no\n")
    talk.until("new conversation")
    talk.until("> ")
    talk.send("hm\n")
    talk.until("hm\n")
    assert talk.until("> ") == greedy(model, "s no\nu hm\na ", 8) + "\n> "
    talk.send("/set temperature hot\n")
    talk.until("(temperature: ")
    talk.send("/reset\n")
    talk.until("(forgotten)")
    assert talk.leave() == 0


def test_a_saved_conversation_begins_a_line_of_its_own(model, tmp_path, monkeypatch, capsys):
    """An editor left the file without a line feed at its end."""
    saved = tmp_path / "talk.jsonl"
    saved.write_text('{"prompt": "a", "completion": "b"}')
    typed = iter(["hm", f"/save {saved}", f"/save {tmp_path}"])

    def read(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(model), "--sampling.max_new_tokens", "4", "--run.threads", "1"]) == 0
    first, second = rows_of(saved)
    assert first == {"prompt": "a", "completion": "b"}
    assert [m["role"] for m in second["messages"]] == ["user", "assistant"]
    assert f"({tmp_path}: it can not be written" in capsys.readouterr().out


def greedy_after(model, first: str) -> str:
    """The second answer: the first one stands in the conversation with its end token."""
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), letters()
    ids = [
        *tokenizer.encode(f"s be\nu hm\na {first}", add_special_tokens=False), 2,
        *tokenizer.encode("u oh\na ", add_special_tokens=False),
    ]  # fmt: skip
    out: list[int] = []
    while len(out) < 8:
        with torch.no_grad():
            token = int(net(torch.tensor([ids + out])).logits[0, -1].argmax())
        if token == 2:
            break
        out.append(token)
    return tokenizer.decode(out, skip_special_tokens=True)


def test_bytes_that_are_no_text_do_not_end_the_conversation(model, monkeypatch, capsys):
    """Python gives them as an error or as half surrogate pairs, as the terminal is set up."""
    typed = iter([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "hm \udcff", EOFError()])

    def read(prompt):
        line = next(typed)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", str(model), "--sampling.max_new_tokens", "4", "--run.threads", "1"]) == 0
    assert "bytes that are not utf-8" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(model):
    talk = Terminal(str(model), "--sampling.max_new_tokens", "4000", "--sampling.top_p", "1")
    talk.until("> ")
    for _ in range(40):  # an answer may end by itself first
        talk.send("hm\n")
        talk.until("hm\n")
        while not talk.read:
            assert talk.more(60)
        os.kill(talk.pid, signal.SIGINT)
        if "(stopped)" in talk.until("\n> "):
            break
        talk.send("/reset\n")
        talk.until("(forgotten)\n> ")
    else:
        pytest.fail("no answer was stopped")
    talk.send("/help\n")
    talk.until("Ctrl-C stops an answer")
    assert talk.leave() == 0
