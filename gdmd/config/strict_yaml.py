"""YAML as ``yaml.safe_load`` reads it, except that a duplicate key or a value inside itself is an error with a line."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

LONGEST_TEXT = 1_000_000
"""Characters. A longer file is something else than a configuration."""
MOST_VALUES = 100_000
"""Values once every alias is written out; more is a mistake, or a trap that no memory is large enough for."""

MOST_NESTED = 50
"""Brackets inside brackets. The reader's time grows with the square of their number, and no configuration has five."""

LONGEST_NUMBER = 1024
"""Bits of a whole number. Python refuses to print one of more than 4,300 digits, so no message could show it."""


class YamlError(ValueError):
    """One line that says what is wrong with the text, and where."""


class _StrictLoader(yaml.SafeLoader):
    """The safe loader with three more errors: duplicate keys, self-containing values, unreadable scalars."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._unfinished: set[str] = set()

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MOST_NESTED:
            raise RecursionError(f"more than {MOST_NESTED} brackets are open")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it out
        anchor, mark = event.anchor, event.start_mark
        if isinstance(event, yaml.AliasEvent) and anchor in self._unfinished:
            raise ComposerError(None, None, f"the value *{anchor} contains itself", mark)
        if isinstance(event, yaml.AliasEvent) or anchor is None:
            return super().compose_node(parent, index)
        self._unfinished.add(anchor)
        node = super().compose_node(parent, index)
        self._unfinished.discard(anchor)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in first_line:
                problem = f"duplicate key {key.value!r} (first on line {first_line[name]}): keep one of the two"
                raise ComposerError(None, None, problem, key.start_mark)
            first_line[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
                raise OverflowError(f"a whole number of {value.bit_length()} bits, at most {LONGEST_NUMBER}")
            return value
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            problem = f"cannot read {str(node.value)[:60]!r} as {node.tag.rpartition(':')[2]} ({error})"
            raise ConstructorError(None, None, problem, node.start_mark) from error


def parse_yaml(text: str) -> Any:
    """The value of one YAML document (None for an empty text); ``YamlError`` says what is wrong on which line."""
    if len(text) > LONGEST_TEXT:
        raise YamlError(f"has {len(text)} characters, at most {LONGEST_TEXT}; give a configuration file")
    try:
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None and (size := _size(node, {})) > MOST_VALUES:
                raise YamlError(f"aliases repeat it to {size:.3g} values, at most {MOST_VALUES}; write them out")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise YamlError(_describe(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"line {line}: the character U+{int(error.character):04X} is not allowed in YAML; remove it"
        ) from error
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError("values are nested too deeply to be read; make the nesting flatter") from error
    except YamlError:
        raise
    except (ValueError, OverflowError) as error:  # a number in an escape or a directive
        raise YamlError(f"an escaped character or a directive cannot be read ({error})") from error


def _size(node: Node, known: dict[int, int]) -> int:
    """Values in a node with every alias written out; ``known`` holds the nodes counted so far."""
    if isinstance(node, ScalarNode):
        return 1
    if id(node) not in known:
        inner = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def _describe(error: yaml.MarkedYAMLError) -> str:
    """line L, column C: what went wrong, while doing what."""
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    doing = f" ({error.context})" if error.context else ""
    return " ".join(f"{place}{error.problem}{doing}".split())
