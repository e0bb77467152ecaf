"""Plain mappings against dataclasses: unknown keys and wrong types become one line that names where, what and the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_keye.errors import UserError

if TYPE_CHECKING:  # imported where it is used: a model can be built where there is no OmegaConf
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

_TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^}]*:")  # ${name:...} would call a function; \${ is plain text


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice most like `word`, however unlike it is."""
    return difflib.get_close_matches(word, list(choices), n=1, cutoff=0.0)[0]


def type_name(tp: Any) -> str:
    """A type hint in words: `int | None` -> "an integer or null"."""
    if get_origin(tp) in (Union, UnionType):
        return " or ".join(type_name(arg) for arg in get_args(tp))
    if get_origin(tp) is list:
        return "a list, each item " + type_name(get_args(tp)[0])
    if is_dataclass(tp):
        return "a section with keys of its own"
    return "null" if tp is NoneType else _TYPE_NAMES.get(tp, str(tp))


def _children(tp: Any) -> dict[str, Any]:
    return get_type_hints(tp) if is_dataclass(tp) else {}


def _item(tp: Any) -> Any:
    """The type of a list's items; None when `tp` is no list."""
    lists = [arg for arg in (tp, *get_args(tp)) if get_origin(arg) is list]
    return get_args(lists[0])[0] if lists else None


def type_at(cls: Any, key: str) -> Any:
    """The type hint at dotted `key` ("data.sources.0.path"), None where the schema has no such key."""
    tp = cls
    for part in key.split("."):
        tp = _item(tp) if part.isdigit() else _children(tp).get(part)
        if tp is None:
            return None
    return tp


def dotted_keys(cls: Any, prefix: str = "") -> list[str]:
    """Every key of the schema in dotted form, sections left out."""
    keys = []
    for name, tp in _children(cls).items():
        keys += dotted_keys(tp, f"{prefix}{name}.") if is_dataclass(tp) else [prefix + name]
    return keys


def _unknown(root: Any, siblings: Iterable[str], prefix: str, name: str, where: str) -> UserError:
    near = difflib.get_close_matches(name, list(siblings), n=1)
    if near:
        suggestion = prefix + near[0]
    else:  # not misspelt but misplaced: the same name elsewhere, else whatever looks most alike
        everywhere = dotted_keys(root)
        same = [key for key in everywhere if key.rsplit(".", 1)[-1] == name]
        suggestion = (
            same[0] if same else nearest(prefix + name, [*everywhere, *(prefix + sibling for sibling in siblings)])
        )
    return UserError(f"{where}: unknown key '{prefix}{name}'; the nearest valid key is '{suggestion}'")


def conform(cls: Any, data: Any, where: str, prefix: str = "", root: Any = None) -> Any:
    """A copy of `data` in which every key exists in type `cls` and every value fits; an empty section becomes {}. Raises UserError."""
    root = root or cls
    key = prefix[:-1]
    if is_dataclass(cls):
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise UserError(f"{where}: {f'{key} = ' if key else ''}{data!r} is not {type_name(cls)}")
        children = _children(cls)
        for name in data:
            if name not in children:
                raise _unknown(root, children, prefix, str(name), where)
        return {name: conform(children[name], value, where, f"{prefix}{name}.", root) for name, value in data.items()}
    if isinstance(data, str) and "${" in data:
        if _RESOLVER.search(data):
            raise UserError(f"{where}: {key} = {data!r}: only plain ${{key}} references are allowed")
        return data  # its type is known once it is resolved
    if isinstance(data, (list, tuple)) and _item(cls):
        return [conform(_item(cls), value, where, f"{prefix}{i}.", root) for i, value in enumerate(data)]
    if not _fits(cls, data):
        raise UserError(f"{where}: {key} = {data!r} is not {type_name(cls)}")
    return data


def _fits(tp: Any, value: Any) -> bool:
    if get_origin(tp) in (Union, UnionType):
        return any(_fits(arg, value) for arg in get_args(tp))
    accepted = {float: (int, float), str: (str, int, float)}.get(tp, tp)  # a run may be named 7
    if get_origin(tp) is list or (isinstance(value, bool) and tp is not bool):
        return False
    return isinstance(value, accepted)


def typed(cls: type, data: dict[str, Any], where: str) -> DictConfig:
    """`data` over the defaults of dataclass `cls`, keys and types checked, ${key} references not yet resolved. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.merge(OmegaConf.structured(cls), conform(cls, data, where))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error, where) from error


def instance(cls: type[T], config: DictConfig, where: str) -> T:
    """The dataclass instance behind `config`. Raises UserError for a value that is missing or a reference that fails."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{where}: {_key(error)} is not set and has no default") from error
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error, where) from error


def _key(error: OmegaConfBaseException) -> str:
    return re.sub(r"\[(\d+)\]", r".\1", error.full_key or "")


def _from_omegaconf(error: OmegaConfBaseException, where: str) -> UserError:
    return UserError(f"{where}: {_key(error)}: {str(error).splitlines()[0]}")
