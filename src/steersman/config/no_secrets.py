"""Passwords and keys in recipes: a recipe is kept in the run folder, shown, and published with the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRET_NAMES = ("api_key", "api-key", "apikey", "access_token", "authorization", "password", "secret", "token")
"""Names under which a request's body may have a secret."""
_USER, _PASSWORD = re.compile(r"//[^/\s]*@"), re.compile(r"//[^/\s:@]*:[^/\s]*@")
_MEND = (
    "leave it out, because recipes are kept, shown and published; put a key into the environment variable that "
    "`key_env` names (for rollout.url: STEERSMAN_ENGINE_KEY, with vLLM VLLM_API_KEY)"
)


def without_secrets(text: str) -> str:
    """The text without names and passwords in front of the hosts of its addresses."""
    return _USER.sub("//[...]@", text)


def require_no_secrets(fields: Mapping[str, Any]) -> None:
    """Raises ValueError naming the place of the first secret in a section's fields, and not the secret.

    Refused are, of a field `url`, all that an address up to its version does not have: `user:password@`, and
    `?key=...`, which would stand in front of the rest of the path as well. Further a password in an address that
    stands anywhere in a field of the user's own names, and SECRET_NAMES in `extra`, the further fields of a request.
    """
    urls = fields.get("url") or []
    for url in [urls] if isinstance(urls, str) else urls:
        if set("@?#") & set(str(url)):
            raise ValueError(
                f"url: an address ends at its version, as http://localhost:8000/v1; this one holds a name, password "
                f"or query; {_MEND}"
            )
    extra = fields.get("extra")
    for name in extra if isinstance(extra, dict) else ():
        if str(name).lower() in SECRET_NAMES:
            raise ValueError(f"extra.{name}: it would be sent as a secret in the body of a request; {_MEND}")
    for place, text in texts_of({name: value for name, value in fields.items() if isinstance(value, dict)}):
        if _PASSWORD.search(text):
            raise ValueError(f"{place}: an address with a password in front of its host; {_MEND}")


def texts_of(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain data, with its place; what is no plain data is left out."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from texts_of(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from texts_of(inner, f"{place}[{i}]")
