"""Settings as text: configurations to and from JSON, changed with `--set a.b=value`, and what their marks mean."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar

from attnorm.config import MODELS, Config, ConfigError, Task, did_you_mean, require

T = TypeVar("T")


def marked(mark: Literal["compare", "resume"], value: str, cls: type = Config, prefix: str = "") -> frozenset[str]:
    """Dotted names of the settings with a mark; a group's mark is that of all in it."""
    hints: dict[str, Any] = typing.get_type_hints(cls)
    names: set[str] = set()
    for setting in dataclasses.fields(cls):
        path, is_marked = prefix + setting.name, setting.metadata.get(mark) == value
        groups = [option for option in _alternatives(hints[setting.name]) if dataclasses.is_dataclass(option)]
        for group in groups:
            below = {f"{path}.{leaf}" for leaf in flatten(typing.cast(type, group)())}
            names |= below if is_marked else marked(mark, value, typing.cast(type, group), f"{path}.")
        if is_marked and not groups:
            names.add(path)
    return frozenset(names)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON types; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def from_dict(cls: type[T], values: dict[str, Any], *, prefix: str = "", ignore_unknown: bool = False) -> T:
    """The inverse of `to_dict`, for any dataclass of plain values, lists, tables and groups of them.

    Raises:
        ConfigError: an unknown key, unless these are to be left out, a missing one, or a value of the wrong type.
    """
    require(
        isinstance(values, dict), f"{prefix.rstrip('.') or 'config'} is {_brief(values)}; expected a group of settings"
    )
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        path = prefix + key
        if key not in hints:
            if ignore_unknown:
                continue
            raise ConfigError(_unknown(path, [prefix + name for name in hints]))
        group = _group(hints[key], values)
        if group is None or (value is None and type(None) in _alternatives(hints[key])):
            arguments[key] = _checked(value, hints[key], path)
        else:
            arguments[key] = from_dict(group, value, prefix=path + ".", ignore_unknown=ignore_unknown)
    for name, setting in getattr(cls, "__dataclass_fields__", {}).items():
        is_needed = setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING
        require(name in arguments or not is_needed, f"{prefix + name} is missing")
    return cls(**arguments)


def _group(hint: Any, values: dict[str, Any]) -> type | None:
    """The dataclass that `hint` means, of several that of the task which `values` name; None for a plain value."""
    groups = [option for option in _alternatives(hint) if dataclasses.is_dataclass(option)]
    if len(groups) > 1:
        return MODELS[_checked(values.get("task", Config.task), Task, "task")]
    return typing.cast(type, groups[0]) if groups else None


def flatten(config: Any) -> dict[str, Any]:
    """{"model.an.num_entities": 16, ...}: every leaf by its dotted name."""

    def walk(values: dict[str, Any], prefix: str) -> typing.Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(to_dict(config), ""))


def override(config: T, settings: typing.Iterable[str]) -> T:
    """A copy of `config` with every "a.b=value" of `settings` applied; what must fit together is checked once, at the
    end, so that only the last of several values of a key counts, and no order else.

    Raises ConfigError for a key that does not exist (naming the nearest one) or a value of the wrong type.
    """
    leaves = flatten(config)
    values: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        path = path.strip()
        require(bool(equals), f"--set got {setting!r}; expected KEY=VALUE, for example run.batch_size=32")
        if path not in leaves:
            raise ConfigError(_unknown(path, list(leaves)))
        *groups, leaf = path.split(".")
        hint = typing.get_type_hints(type(functools.reduce(getattr, groups, config)))[leaf]
        values[path] = _parse(text.strip(), hint, path)
    changed = _with_values(config, values)
    if isinstance(changed, Config) and any(
        values.get(path, leaves[path]) != leaves[path] for path in MAKES_A_ROW & leaves.keys()
    ):
        return typing.cast(T, dataclasses.replace(changed, row=""))
    return changed


def _with_values(config: T, values: dict[str, Any]) -> T:
    """A copy with the leaves of these dotted names replaced; each group is made, and so validated, once."""
    changes: dict[str, Any] = {path: value for path, value in values.items() if "." not in path}
    for group in dict.fromkeys(path.partition(".")[0] for path in values if "." in path):
        below = {
            path.removeprefix(f"{group}."): value for path, value in values.items() if path.startswith(f"{group}.")
        }
        changes[group] = _with_values(getattr(config, group), below)
    return dataclasses.replace(typing.cast(Any, config), **changes)


def _unknown(path: str, known: list[str]) -> str:
    by_leaf = [name for name in known if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    hint = did_you_mean(path, by_leaf or known).rstrip() or "`attnorm train --preset P --dry-run` prints all there are"
    return f"there is no setting {path}; {hint}"


def _parse(text: str, hint: Any, path: str) -> Any:
    """The text of a command line as a value of type `hint`."""
    options = _alternatives(hint)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if typing.get_origin(hint) is tuple:
        items = [item for item in text.strip("()[]").split(",") if item.strip()]
        return tuple(_parse(item.strip(), typing.get_args(hint)[0], path) for item in items)
    if bool in options:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        require(text.lower() in words, f"{path} is {text!r}; expected true or false")
        return words[text.lower()]
    if text in _words(options):
        return text
    for kind in (int, float):
        if kind in options:
            try:
                value = _whole(text) if kind is int and "e" in text.lower() else kind(text.replace("_", ""))
            except (ValueError, OverflowError):
                raise ConfigError(f"{path} is {text!r}; expected {_describe(hint)}") from None
            return _checked(value, hint, path)
    return _checked(text, hint, path)


def _whole(text: str) -> int:
    """1e6 for an integer setting: what people type for large counts."""
    if not float(text).is_integer():
        raise ValueError(text)
    return int(float(text))


def _checked(value: Any, hint: Any, path: str) -> Any:
    """`value`, if it is of type `hint`; where these are meant, JSON's lists become tuples and whole numbers floats."""
    message = f"{path} is {_brief(value)}; expected {_describe(hint)}"
    if typing.get_origin(hint) is Literal:
        near = did_you_mean(
            value if isinstance(value, str) else "", map(str, typing.get_args(hint)), cutoff=0.6
        ).rstrip()
        require(isinstance(value, str) and value in typing.get_args(hint), message + (near and f"; {near}"))
        return value
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, (list, tuple)), message)
        return tuple(_checked(item, typing.get_args(hint)[0], path) for item in value)
    if typing.get_origin(hint) is dict:
        require(isinstance(value, dict), message)
        return {key: _checked(item, typing.get_args(hint)[1], f"{path}.{key}") for key, item in value.items()}
    options = _alternatives(hint)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**1023, message)
        return float(value)
    require(type(value) in options or value in _words(options), message)
    require(not isinstance(value, float) or math.isfinite(value), message)
    return value


def _brief(value: Any) -> str:
    """A value for a message: of one that is long or deep, a part."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 200
    return shown.repr(value)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _words(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a union takes by name, beside its types: of `float | Literal["auto"]`, "auto"."""
    return tuple(word for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_describe(typing.get_args(hint)[0])}, comma between"
    if typing.get_origin(hint) is dict:
        return f"a table of {_describe(typing.get_args(hint)[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return " or ".join(
        "a group of settings"
        if dataclasses.is_dataclass(option)
        else " or ".join(_words((option,))) or names.get(option, str(option))
        for option in _alternatives(hint)
    )


MAKES_A_ROW = marked("compare", "row")
MAY_DIFFER = marked("compare", "free")  # where runs are compared
MAY_CHANGE_ON_RESUME = marked("resume", "free")
