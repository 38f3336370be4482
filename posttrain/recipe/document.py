"""A recipe's text: YAML with the line of every key, and `--set` overrides on top of it.

Plain scalars are read by the rules of YAML 1.2, where YAML 1.1 surprises: `1e-3` is a number, `no`, `on` and
`2026-01-02` are text, and `010` is no octal number. Only plain data is built, never an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import BadInput

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_VALUES = 20_000
"""With every alias written out: a small file can otherwise stand for a huge one."""

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,30})")
_FLOAT = re.compile(
    r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_SCALARS: tuple[tuple[str, re.Pattern[str], list[str] | None], ...] = (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", re.compile(r"<<"), ["<"]),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
)
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2."""


class RecipeDumper(yaml.SafeDumper):
    """Writes what `RecipeLoader` reads back as the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes keep these: elsewhere PyYAML folds Unicode's own line breaks into spaces.
        style = '"' if set(data) & set("\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


RecipeLoader.yaml_implicit_resolvers = {}
RecipeDumper.yaml_implicit_resolvers = {}
RecipeDumper.add_representer(str, RecipeDumper.represent_str)
for _name, _pattern, _first in _SCALARS:
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)
    RecipeDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)


def dotted(key: KeyPath) -> str:
    """`("stages", "experts", "per_domain", 0, "steps")` as `stages.experts.per_domain[0].steps`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def split_key(text: str) -> KeyPath:
    """The opposite of `dotted`; `per_domain.0.steps` is understood too."""
    parts = re.sub(r"\[(\d+)\]", r".\1", text).split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts)


@dataclass
class Document:
    """A recipe as plain data, not yet checked, which knows where each value was written."""

    path: Path
    data: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    """Where a key stands: `recipes/tiny.yaml:14`, or `--set stages.base.steps=10`."""

    def place(self, key: KeyPath) -> str:
        """Where `key` was written; for a key that is not there, its nearest parent."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return str(self.path)

    def value(self, key: KeyPath) -> Any:
        """The value of `key`."""
        value = self.data
        for part in key:
            value = value[part]
        return value

    def override(self, assignment: str, place: str | None = None) -> None:
        """Apply `dotted.key=value`, where the value is YAML. Everything beside the key stays as it is.

        Raises:
            BadInput: no `=`, a value that is not YAML, or a key below something that is not a mapping or list.
        """
        place = place or f"--set {assignment}"
        text, separator, written = assignment.partition("=")
        key = split_key(text.strip())
        if not separator or "" in key:
            raise BadInput(f"{place}: write --set key.of.the.recipe=value")
        value, _ = _parse(written, place)
        parent = self.data
        for depth, part in enumerate(key[:-1]):
            if isinstance(parent, dict) and parent.get(part) is None:
                parent[part] = {}
            parent = _step(parent, part, key[:depth], place)
        if isinstance(parent, dict):
            parent[key[-1]] = value
        else:
            _step(parent, key[-1], key[:-1], place)
            parent[key[-1]] = value
        for known in [known for known in self.places if known[: len(key)] == key]:
            del self.places[known]
        self.places[key] = place


def _step(parent: Any, part: str | int, key: KeyPath, place: str) -> Any:
    """The value of `part` in `parent`, which stands at `key`."""
    if isinstance(parent, dict):
        return parent[part]
    if not isinstance(parent, list):
        raise BadInput(f"{place}: {dotted(key)} is {parent!r}, which holds no {part!r}")
    if not isinstance(part, int) or part >= len(parent):
        raise BadInput(f"{place}: {dotted(key)} is a list of {len(parent)}; name an entry by a number from 0")
    return parent[part]


def read_document(path: Path) -> Document:
    """Read a recipe file without checking it against the schema.

    Raises:
        BadInput: no such file, not text, not YAML, a key written twice, or not a mapping.
    """
    data, lines = _parse(_read_text(path), str(path))
    if data is None:
        raise BadInput(
            f"{path}: the file is empty; a recipe is a mapping with the keys name, model, domains and stages"
        )
    if not isinstance(data, dict):
        kind = "list" if isinstance(data, list) else "single value"
        raise BadInput(f"{path}:1: a recipe is a mapping of keys to values; this is a {kind}")
    return Document(path, data, {key: f"{path}:{line}" for key, line in lines.items()})


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise BadInput(f"{path}: this is a directory; give a recipe file{_recipes_in(path)}")
    if not path.exists():
        parent = path.parent if path.parent.is_dir() else Path()
        raise BadInput(f"{path}: there is no such file{_recipes_in(parent) or _recipes_in(Path('recipes'))}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise BadInput(f"{path}: larger than {MAX_BYTES >> 20} MiB; that is no recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a text file: byte {error.start} is not UTF-8; a recipe is YAML text") from error


def _recipes_in(directory: Path) -> str:
    found = sorted(str(path) for path in directory.glob("*.y*ml"))[:5] if directory.is_dir() else []
    return f"; there are {', '.join(found)}" if found else ""


def _parse(text: str, place: str) -> tuple[Any, dict[KeyPath, int]]:
    """The value of one YAML document and the line of each of its keys."""
    try:
        loader = RecipeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        for count, problem in enumerate(_structure_problems(node, (), 0), 1):
            if problem or count > MAX_VALUES:
                raise BadInput(f"{place}{problem or f': more than {MAX_VALUES} values; that is no recipe'}")
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise BadInput(_yaml_message(error, place)) from error
    except RecursionError as error:
        raise BadInput(f"{place}: nested too deeply; that is no recipe") from error
    return data, dict(_lines(node, ()))


def _yaml_message(error: yaml.YAMLError, place: str) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    where = f":{mark.line + 1}" if mark and not place.startswith("--") else ""
    return f"{place}{where}: not valid YAML: {what}" + (f" ({context})" if context else "")


def _structure_problems(node: yaml.Node, key: KeyPath, depth: int) -> Iterator[str]:
    """One text for each value: empty when it is fine, else what is wrong with where it stands, from the colon on."""
    where = f":{node.start_mark.line + 1}: {dotted(key) or 'the recipe'}"
    if depth > MAX_DEPTH:
        yield f"{where[:80]}...: nested too deeply; that is no recipe"
        return
    yield "" if node.tag in _TAGS else f"{where}: the tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed"
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _structure_problems(item, (*key, index), depth + 1)
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag.rpartition(":")[2] not in ("str", "merge"):
                shown = name.value if isinstance(name, yaml.ScalarNode) else "a list or mapping"
                yield f":{line}: {dotted(key) or 'the recipe'}: a key is text; {shown} is not (quote it to make it so)"
                return
            if name.value in first_lines:
                yield f":{line}: {dotted((*key, name.value))}: written twice, first in line {first_lines[name.value]}"
            first_lines[name.value] = line
            yield from _structure_problems(value, (*key, name.value), depth + 1)


def _lines(node: yaml.Node, key: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """The line (from 1) of every key and list entry; merged-in keys (`<<`) have those of where they come from."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*key, index), item.start_mark.line + 1
            yield from _lines(item, (*key, index))
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield (*key, name.value), name.start_mark.line + 1
            yield from _lines(value, (*key, name.value))
