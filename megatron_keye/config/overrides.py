"""`a.b=c` from the command line."""

from __future__ import annotations

import copy
from typing import Any, get_args

import yaml

from megatron_keye.config import schema
from megatron_keye.config.yaml_io import parse_yaml
from megatron_keye.errors import UserError


def apply_override(cls: type, data: dict[str, Any], text: str) -> dict[str, Any]:
    """A copy of `data` with the override `text`; a number in the key counts list items from 0. Raises UserError."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' is no override; write key=value, for instance optimizer.lr=1e-5 or profile=mini")
    data = copy.deepcopy(data)
    node: Any = data
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, ".".join(parents[:i]), text)]
        else:
            following = (parents[i + 1 :] + [last])[0]
            if node.get(part) is None:
                node[part] = [] if following.isdigit() else {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise UserError(f"override '{text}': '{'.'.join(parents[: i + 1])}' holds {node!r} and has no keys")
    value = _value(schema.type_at(cls, key), raw, text)
    if isinstance(node, list):
        node[_index(node, last, ".".join(parents), text)] = value
    else:
        node[last] = value
    return data


def _index(items: list[Any], part: str, key: str, text: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        valid = f"0 to {len(items) - 1}" if items else "none, it is empty"
        raise UserError(f"override '{text}': '{key}' is a list; '{part}' is none of its items ({valid})")
    return int(part)


def _value(expected: Any, raw: str, text: str) -> Any:
    """`raw` read as YAML, except that a key of type text takes it as written ("name=007", "system_prompt=You are: kind")."""
    is_text = expected is str or str in get_args(expected)
    try:
        value = parse_yaml(raw)
    except yaml.YAMLError as error:
        if not is_text:
            raise UserError(f"override '{text}': '{raw}' is not a valid YAML value") from error
        return raw
    return value if value is None or isinstance(value, str) or not is_text else raw
