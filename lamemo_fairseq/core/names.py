"""Names that users write: options and files, and the nearest known name to a misspelt one."""

import difflib
import functools
import inspect
import os
from pathlib import Path
from typing import Callable, Collection, Iterable, Optional, ParamSpec, Set, TypeVar, Union

P = ParamSpec("P")
R = TypeVar("R")


def option_name(field: str) -> str:
    """Return the name on the command line of an option's field."""
    return "--" + field.replace("_", "-")


def did_you_mean(
    name: str, known: Iterable[str], cutoff: float = 0.6, shown: Callable[[str], str] = str
) -> Optional[str]:
    """Return the question that ends a message on an unknown name, None if no known name is near.

    Args:
        name: the unknown name.
        known: the names to choose from.
        cutoff: the least similarity, from 0 to 1.
        shown: formats a known name for the question.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(map(shown, near))}?" if near else None


def not_known(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message on a name that is not *known*, with the nearest known ones.

    Args:
        kind: the text before the name.
    """
    names = list(known)
    otherwise = f"pass one of {', '.join(names)}" if len(names) < 20 else "--help lists the known names"
    return f"{kind}{name} is not known: {did_you_mean(name, names) or otherwise}"


def with_nearest_names(call: Callable[P, R]) -> Callable[P, R]:
    """Return a function as it was, whose error on an unknown argument proposes the nearest name.

    Raises:
        TypeError: an argument's name is not known.
    """
    known = list(inspect.signature(call).parameters)

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                hint = did_you_mean(name, known) or f"it knows {', '.join(n for n in known if n != 'self')}"
                raise TypeError(f"{call.__name__} does not know '{name}': {hint}")
        return call(*args, **kwargs)

    return checked


def check_spelling(own: type, base: type, others: Collection[str] = ()) -> None:
    """Refuse a member of a user's *own* class with nearly the name of one of its *base*, which would have no effect.

    Methods are compared with methods alone. A member that the class itself reads is a helper, whatever its name.

    Args:
        others: members that another class reads, whatever their names.

    Raises:
        ValueError: the message has the name, and the nearest one.
    """
    known = {name for name in (*vars(base), *inspect.get_annotations(base)) if not name.startswith("_")}
    for cls in own.__mro__[: own.__mro__.index(base)]:
        members = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
        read = set().union(*map(_names_read, vars(cls).values()))
        for name in members.keys() - known - read - {*others}:
            alike = [other for other in known if _is_method(vars(base).get(other)) == _is_method(members[name])]
            hint = did_you_mean(name, alike, cutoff=0.85)
            if hint:
                raise ValueError(
                    f"{cls.__name__}.{name} would have no effect, as {base.__name__} has no such member: {hint} Give a "
                    "helper a name that is less alike"
                )


def _is_method(member: object) -> bool:
    return inspect.isfunction(getattr(member, "__func__", member))


def _names_read(member: object) -> Set[str]:
    """Return the names that the code of a method or property reads, within its functions too."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    codes, names = [getattr(function, "__code__", None)], set()
    for code in filter(None, codes):
        names |= {*code.co_names}
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return names


def hiding_folder(root: Union[str, Path]) -> Optional[Path]:
    """Return a package within the packages of *root* that Python imports in place of a module with its name, if any."""
    packages = (path.parent for path in Path(root).glob("*/*/__init__.py"))
    return next((package for package in packages if package.with_suffix(".py").exists()), None)


def nearest_path(path: Union[str, Path]) -> str:
    """Return the end of a message on a path that is not there, empty if no path is near: ``: did you mean PATH?``.

    The first name of the path that is not there is taken for the misspelt one.
    """
    given = Path(path)
    absent = next((part for part in (*reversed(given.parents), given) if not os.path.exists(part)), None)
    if absent is None:
        return ""
    try:
        beside = {name: absent.with_name(name) / given.relative_to(absent) for name in os.listdir(absent.parent)}
    except OSError:  # not a folder, or one that may not be read
        return ""
    there = [name for name, whole in beside.items() if os.path.exists(whole)]
    hint = did_you_mean(absent.name, there, shown=lambda name: str(beside[name]))
    return f": {hint}" if hint else ""


def missing_checkpoint(path: str, option: str = "") -> str:
    """Return the message on a checkpoint that is not there, with the nearest ones that are.

    Args:
        path: the path as it was given.
        option: the option that names it; empty for an argument without a name.
    """
    message = f"{option} {path}: there is no such file" if option else f"there is no checkpoint {path}"
    folder, missing = Path(path), 0  # the nearest folder that exists, and how many names of the path do not
    while not folder.is_dir():
        folder, missing = folder.parent, missing + 1
    if missing and str(folder) == folder.anchor:  # the root
        return f"{message}, nor is there a folder {Path(path).parent}"
    patterns = ["/".join([*["*"] * depth, "*.pt"]) for depth in range(max(1, min(missing, 3)))]
    there = sorted((str(found) for pattern in patterns for found in folder.glob(pattern)), reverse=True)
    if not there:
        return f"{message}, and {folder.resolve()} has no checkpoints"
    place = "this folder" if folder == Path() else folder
    others = f"{place} has {', '.join(there[:5])}" + (" and others" if len(there) > 5 else "")
    return f"{message}: {did_you_mean(str(Path(path)), there) or others}"
