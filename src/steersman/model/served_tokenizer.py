"""Whether a server reads and writes the token ids that a model does: asked by /tokenize, a route of vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steersman.guards.terminal import say
from steersman.types import SteersmanError

TEXT = (
    "The quick brown fox jumps over 13 lazy dogs, isn't it?\n\tdef area(r): return 3.14159 * r ** 2  # naïve\n"
    "Größe, año, Привет мир, 你好世界, こんにちは, مرحبا, नमस्ते, 😀"
)
"""Prose, code, numbers and several scripts."""
SPREAD = 32
"""Tokens from all over the vocabulary that stand behind TEXT."""


def tokenize_request(tokenizer: Any) -> dict[str, Any]:
    """The body of a request to /tokenize, less its model: a text that many parts of the vocabulary are needed for."""
    ids = sorted(tokenizer.get_vocab().values())
    spread = tokenizer.decode(ids[:: max(1, len(ids) // SPREAD)], skip_special_tokens=True)
    return {"prompt": f"{TEXT} {spread}", "add_special_tokens": False, "return_token_strs": True}


def require_same_tokens(
    tokenizer: Any, request: dict[str, Any], told: Any, message: Callable[[str], str], *, mend: str
) -> None:
    """Compares what a server made of the request with what the tokenizer of the model that is trained makes of it.

    `told` is the answer, {"tokens": ids, "token_strs": their entries in the vocabulary}; None where the server has no
    such route. `message` puts the server's name before a text, and `mend` says what to do about another tokenizer.
    Raises SteersmanError where an id is another token there. Only says so where texts are cut into tokens of the same
    vocabulary otherwise, which does no harm where ids are sent, and where nothing can be compared.
    """
    ours = tokenizer.encode(request["prompt"], add_special_tokens=False)
    found = told if isinstance(told, dict) else {}
    theirs, entries = found.get("tokens"), found.get("token_strs")
    if not isinstance(theirs, list) or not theirs:
        say(message("it has no /tokenize, so its tokenizer could not be compared with that of the model in training"))
        return
    if theirs == ours:
        return
    if not isinstance(entries, list) or len(entries) != len(theirs):
        differs = f"a text becomes {_begin(theirs)} there, and {_begin(ours)} in the model that is trained"
        raise SteersmanError(message(f"it has another tokenizer: {differs}. {mend}"))
    known = {i: entry for entry, i in tokenizer.get_vocab().items()}
    for token, entry in zip(theirs, entries, strict=True):
        own = known.get(token)
        if own != entry:
            here = "does not exist" if own is None else f"is {own!r}"
            differs = f"id {token} is {entry!r} there, and {here} in the model that is trained"
            raise SteersmanError(message(f"it has another tokenizer: {differs}. {mend}"))
    say(
        message("it cuts texts into tokens otherwise, of the same vocabulary; token ids are sent, so it does no harm")
    )


def _begin(ids: list[Any]) -> str:
    return f"{str(ids[:8])[1:-1][:80]}, ..."
