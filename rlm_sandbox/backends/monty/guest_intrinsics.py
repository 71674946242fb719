"""Guest code, in Monty's subset of Python: fed once into every new interpreter, before ``setup``.

``HostCallError`` is a name for RuntimeError, because this subset has no class inheritance. Names that begin with
``_rlm`` are not shown by ``names()``. ``_rlm_known`` is not defined here: the host answers it.
A cell may overwrite any of this and so fool itself; nothing here is trusted by the host.
"""

import datetime as _rlm_dt  # noqa: ICN001 - a plain name would be a variable of the guest

HostCallError = RuntimeError

_rlm_leaves = {
    type(None), bool, int, float, str, bytes,
    _rlm_dt.datetime, _rlm_dt.date, _rlm_dt.time, _rlm_dt.timedelta, _rlm_dt.timezone,
}  # fmt: skip


_rlm_round = round


def round(number: object, ndigits: object = None) -> object:  # noqa: A001 - it takes the place of the engine's
    """The engine rounds what lies just below the middle up: 2.675 to 2.68. Its formatting is right."""
    if type(number) is float and type(ndigits) is int and 0 <= ndigits <= 300 and -1e300 < number < 1e300:
        return float(f"{number:.{ndigits}f}")
    return _rlm_round(number, ndigits)  # type: ignore[call-overload]


_rlm_hasattr = hasattr
#: Type name to the names of its methods between blanks: texts are dumped fast. The host adds it: to the engine a method is
#: no attribute of a built-in value.
_rlm_methods: dict[str, str] = {}


def hasattr(value: object, name: object) -> bool:  # noqa: A001 - it takes the place of the engine's
    """As the engine's, but methods of built-in values count."""
    return _rlm_hasattr(value, name) or f" {name} " in _rlm_methods.get(type(value).__name__, "")  # type: ignore[arg-type]


def _rlm_echo(value: object) -> str | None:
    """What the last expression of a cell shows."""
    return None if value is None else repr(value)


def _rlm_plain(value: object, mark: str, above: list[object] | None, depth: int) -> object:
    """``value`` with everything that is not plain data replaced by ``(mark, type name, repr)``.

    Without this a function or an iterator would reach the host as a mere text. ``above``: the containers around ``value``,
    to find one that contains itself; None does without, in less time.
    """
    kind = type(value)
    if kind in _rlm_leaves:
        return value
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return (mark, kind.__name__, repr(value)[:2000])
    if above is not None:
        if any([one is value for one in above]):  # noqa: C419 - to the engine a generator expression is a list too
            return (mark, kind.__name__, repr(value)[:2000])
        above = [*above, value]
    if depth > 64:
        raise ValueError("the value is nested deeper than 64 levels")
    if isinstance(value, list):
        return [_rlm_plain(item, mark, above, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_rlm_plain(key, mark, above, depth + 1): _rlm_plain(item, mark, above, depth + 1) for key, item in value.items()}
    items = [_rlm_plain(item, mark, above, depth + 1) for item in value]
    return tuple(items) if isinstance(value, tuple) else set(items) if isinstance(value, set) else frozenset(items)


def _rlm_take(scope: dict[str, object], names: list[str], mark: str) -> dict[str, object]:
    """The plain values of those of ``names`` that exist."""
    try:
        return {name: _rlm_plain(scope[name], mark, None, 0) for name in names if name in scope}
    except ValueError:
        return {name: _rlm_plain(scope[name], mark, [], 0) for name in names if name in scope}


def _rlm_summary(value: object) -> str:
    """A short description that runs none of the value's own code and copies no large value."""
    name = type(value).__name__
    if isinstance(value, str):
        text = repr(value[:60])
        return f"{name}, {len(value)} characters: {text}" if len(value) > 60 else f"{name}: {text}"
    if isinstance(value, bytes):
        return f"{name}, {len(value)} bytes"
    if value is None or isinstance(value, (bool, float)):
        return f"{name}: {value}"
    if isinstance(value, int):
        return f"{name}: {value}" if -(10**60) < value < 10**60 else f"{name}, a large number"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{name}, {len(value)} items"
    return name


def _rlm_summaries(scope: dict[str, object]) -> dict[str, str]:
    """Every variable of ``scope`` that is not the machinery's."""
    return {name: _rlm_summary(scope[name]) for name in scope if not name.startswith("_rlm")}


def session_names() -> dict[str, str]:
    """The session's variables: name to a short summary."""
    _rlm_found: dict[str, str] = {}
    for _rlm_name in _rlm_known():  # type: ignore[name-defined]  # noqa: F821 - the host answers it
        try:
            _rlm_found[_rlm_name] = _rlm_summary(eval(_rlm_name))  # noqa: S307 - a name of a variable, in the guest
        except NameError:
            pass
    return _rlm_found
