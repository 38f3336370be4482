"""Tools: a function, the schema that the model sees, and the text that it gets back."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posttrain.data.v4 import ToolCall
from posttrain.data.v4.messages import to_json
from posttrain.errors import BadInput
from posttrain.imports import import_object
from rollouts.environments.calculator import calculator

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class ToolError(Exception):
    """A call that cannot be carried out: told to the model."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """A JSON schema of type object. Checked of it: which parameters there are and must be, their types and enums."""
    function: Callable[..., Any]
    seconds: float = 10.0
    """How long a call may take. One that takes longer is told to the model as an error, and left to itself."""

    def schema(self) -> dict[str, Any]:
        """In OpenAI's form, for a message's `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def run(self, call: ToolCall) -> str:
        """The function's result as text: strings as they are, everything else as JSON where it can be.

        Raises:
            ToolError: arguments that do not fit the schema, whatever the function raised, or no result in time.
        """
        self._check(call.arguments)
        result = self._result(call.arguments)
        if isinstance(result, str):
            return result
        try:
            return to_json(result)
        except (TypeError, ValueError):
            return str(result)

    def _result(self, arguments: Mapping[str, Any]) -> Any:
        """In a thread of its own: Python cannot end a function, but it need not wait for one."""
        results: list[Any] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                results.append(self.function(**arguments))
            except BaseException as error:
                errors.append(error)

        thread = Thread(target=call, name=f"tool-{self.name}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if errors:
            error = errors[0]
            raise ToolError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        if not results:
            raise ToolError(f"{self.name} took longer than {self.seconds:g} s")
        return results[0]

    def _check(self, arguments: Mapping[str, Any]) -> None:
        properties = self.parameters.get("properties", {})
        unknown = [name for name in arguments if name not in properties]
        if unknown and not self.parameters.get("additionalProperties", False):
            takes = ", ".join(properties) or "no parameters"
            raise ToolError(f"{self.name} has no parameter {unknown[0]!r}; it takes {takes}")
        missing = [name for name in self.parameters.get("required", ()) if name not in arguments]
        if missing:
            raise ToolError(f"{self.name} needs the parameter {missing[0]!r}")
        for name, value in arguments.items():
            _check_value(name, value, properties.get(name, {}))


def _check_value(name: str, value: Any, schema: Mapping[str, Any]) -> None:
    allowed = schema.get("enum")
    if allowed is not None and value not in allowed:
        raise ToolError(f"{name!r} is one of {', '.join(map(to_json, allowed))}, not {to_json(value)}")
    wanted = schema.get("type")
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    if names and not any(_is_of(value, kind) for kind in names):
        raise ToolError(f"{name!r} is of type {' or '.join(names)}, not {to_json(value)[:60]}")


def _is_of(value: Any, kind: str) -> bool:
    # In Python, True is an integer.
    return isinstance(value, JSON_TYPES.get(kind, (object,))) and (not isinstance(value, bool) or kind == "boolean")


def schema_tool(schema: Mapping[str, Any], function: Callable[..., Any]) -> Tool:
    """A tool from OpenAI's schema of it, `{"type": "function", "function": {...}}`, and a function of its parameters.

    Raises:
        BadInput: no such schema, or a type that JSON schema does not have.
    """
    described = schema.get("function") if isinstance(schema, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(described.get("name"), str):
        raise BadInput(f'a tool\'s schema is {{"type": "function", "function": {{"name": ...}}}}, not {schema!r}')
    parameters = described.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise BadInput(f"tool {described['name']}: `parameters` is a JSON schema of type object, not {parameters!r}")
    for name, value in parameters.get("properties", {}).items():
        kinds = value.get("type", ()) if isinstance(value, Mapping) else value
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            if kind not in JSON_TYPES:
                raise BadInput(f"tool {described['name']}: {name!r} has the type {kind!r}; JSON has {[*JSON_TYPES]}")
    return Tool(described["name"], described.get("description", ""), parameters, function)


def function_tool(function: Callable[..., Any]) -> Tool:
    """A tool from a Python function: its name, its type hints, and its docstring (Google style).

    Raises:
        BadInput: a parameter without a type hint, or of a type that JSON does not have.
    """
    name = function.__name__
    hints = get_type_hints(function)
    summary, descriptions = _read_docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        where = f"the parameter {parameter.name!r} of the tool {name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BadInput(f"{where} cannot be passed by name")
        if parameter.name not in hints:
            raise BadInput(f"{where} has no type hint")
        schema = _schema_of(hints[parameter.name], where)
        if parameter.name in descriptions:
            schema["description"] = descriptions[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        properties[parameter.name] = schema
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool(name, summary, parameters, function)


def named_tool(name: str, where: str) -> Tool:
    """A tool as a recipe names it: `calculator`, or `package.module:name` of a function or of a `Tool`.

    Args:
        where: the recipe's key, for messages.

    Raises:
        BadInput: no such tool, or a function that cannot be one.
    """
    if name == "calculator":
        return function_tool(calculator)
    if ":" not in name:
        raise BadInput(f"{where}: there is no tool {name!r}; there are calculator and package.module:function")
    found = import_object(name, where)
    if isinstance(found, Tool):
        return found
    if not callable(found):
        raise BadInput(f"{where}: {name} is neither a function nor a Tool")
    try:
        return function_tool(found)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _schema_of(arguments[0], where)}
    if origin is dict and arguments[0] is str:
        return {"type": "object"}
    if origin in (Union, types.UnionType):
        inner = [_schema_of(argument, where) for argument in arguments if argument is not type(None)]
        if len(inner) == 1 and "type" in inner[0] and len(arguments) == 2:
            return {**inner[0], "type": [inner[0]["type"], "null"]}
    raise BadInput(
        f"{where} has the type {hint}; a tool takes str, int, float, bool, Literal, list, dict or `... | None`"
    )


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says before its sections, and of each parameter."""
    summary, _, sections = text.partition("\nArgs:\n")
    described: dict[str, str] = {}
    for match in re.finditer(r"^ +(\w+)(?: \([^)]*\))?: (.+(?:\n {6,}\S.*)*)", sections.split("\n\n")[0], re.MULTILINE):
        described[match[1]] = " ".join(match[2].split())
    return re.split(r"\n(?:Returns|Raises):\n", summary)[0].strip(), described
