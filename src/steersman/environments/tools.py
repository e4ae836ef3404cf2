"""Typed Python functions as tools: signature and docstring are the schema, and arguments are checked by it."""

from __future__ import annotations

import builtins
import inspect
import json
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from steersman.environments.port import Call
from steersman.types import SteersmanError

_ARGUMENT = re.compile(r"^\s{2,}(\*{0,2}\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with its schema; `arguments` checks what a call passes."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    arguments: type[BaseModel]
    findings: tuple[str, ...] = ()

    def check(self, call: Call) -> dict[str, Any]:
        """The call's arguments by name, as the types that JSON stands for: a date, a tuple, a member of an Enum.

        Raises ValueError, in words for the model, where they don't fit.
        """
        try:
            made = self.arguments.model_validate_json(json.dumps(call.arguments))
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{self.name}: {faults}") from None
        return {name: getattr(made, name) for name in self.arguments.model_fields}


def tool_of(function: Callable[..., Any], where: str) -> Tool:
    """The tool that a typed function is; `where` names it in messages.

    Raises SteersmanError for a parameter without a type or of a type that has no schema, for `*args` and `**kwargs`,
    and for the name of a Python keyword. `findings` tells what the model would miss: a docstring, or what a
    parameter means; and a name that is also a builtin's, which models are apt to call with the builtin's arguments.
    """
    name = function.__name__
    if keyword.iskeyword(name) or not name.isidentifier():
        raise SteersmanError(f"{where}: {name!r} is no name for a tool; name the function otherwise")
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise SteersmanError(f"{where}: the types of its parameters can't be read: {error}") from error
    summary, told = _docstring(function)
    fields: dict[str, Any] = {}
    findings = [] if summary else [f"{name}: no docstring, so the model is not told what it does"]
    if name in vars(builtins):
        findings.append(f"{name}: also the name of a Python builtin; models may call it with the builtin's arguments")
    parameters_of = list(inspect.signature(function).parameters.values())
    for parameter in parameters_of[1:] if parameters_of and parameters_of[0].name == "self" else parameters_of:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise SteersmanError(f"{where}: *{parameter.name} has no schema; give each argument a name and a type")
        if parameter.name not in hints:
            raise SteersmanError(
                f"{where}: parameter {parameter.name} has no type; write it, as in `{parameter.name}: int`"
            )
        if parameter.name not in told:
            findings.append(f"{name}: the docstring does not tell what {parameter.name} is")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], Field(default, description=told.get(parameter.name)))
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
        parameters = model.model_json_schema()
    except (PydanticUserError, TypeError, NameError, ValueError) as error:
        raise SteersmanError(f"{where}: a parameter's type has no schema: {str(error).splitlines()[0]}") from error
    parameters = {"type": "object", **_without_titles(parameters)}
    schema = {"type": "function", "function": {"name": name, "description": summary, "parameters": parameters}}
    return Tool(name, function, schema, model, tuple(findings))


def tools_of(functions: Sequence[tuple[str, Callable[..., Any]]]) -> dict[str, Tool]:
    """Tools by name. Raises SteersmanError where two have one name."""
    tools: dict[str, Tool] = {}
    for where, function in functions:
        tool = tool_of(function, where)
        if tool.name in tools:
            raise SteersmanError(f"{where}: there are two tools named {tool.name}; rename one")
        tools[tool.name] = tool
    return tools


def as_text(result: Any) -> str:
    """What the model is shown of a result: text as it is, else JSON, else `str`."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {k: _without_titles(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    return [_without_titles(x) for x in schema] if isinstance(schema, list) else schema


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The text before the sections of a docstring, and what its section `Args:` says of each parameter."""
    text = inspect.getdoc(function) or ""
    head, _, rest = text.partition("Args:")
    summary = re.split(r"\n(?:Returns|Raises|Yields|Example)s?:", head)[0].strip()
    told: dict[str, str] = {}
    last = None
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        found = _ARGUMENT.match(line)
        if found:
            last = found[1].lstrip("*")
            told[last] = found[2].strip()
        elif last and line.strip():
            told[last] += " " + line.strip()
    return summary, told
