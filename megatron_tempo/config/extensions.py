"""User code named in the configuration as `import:package.module:name`: its names, its loader, and its checks.

The loader imports the object and checks it against what its kind requires. It runs before any model is loaded
(`config.rules.extensions`); an extension that imports no torch keeps `check` fast. docs/extending.md describes each
kind for users.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tempo.errors import InputError

PREFIX = "import:"
_NAME = re.compile(r"import:(?P<module>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<attribute>[^\W\d]\w*)")


class ExtensionError(InputError):
    """An extension that cannot be used: what is wrong, and the fix."""

    def __init__(self, wrong: str, fix: str) -> None:
        self.wrong, self.fix = wrong, fix
        super().__init__(f"{wrong}; fix: {fix}")


class Extension(str):
    """The name of a user's object. It has `name`, as an enum member has, so that both are used alike.

    >>> Extension("import:my_rewards.units:verifier").module
    'my_rewards.units'
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Extension:
        """Raises ExtensionError if `text` does not have the form `import:package.module:name`."""
        if not _NAME.fullmatch(text):
            raise ExtensionError(
                "does not have the form import:package.module:name", "import:my_package.my_module:name"
            )
        return cls(text)

    @property
    def name(self) -> str:
        return str(self)

    @property
    def module(self) -> str:
        return self.removeprefix(PREFIX).partition(":")[0]

    @property
    def attribute(self) -> str:
        return self.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class LoadedVerifier:
    """A user's verifier. `graded`: its scores may lie between 0 and 1."""

    score: Callable[[str, str, str], object]
    check: Callable[[str, str], object] | None
    answer_of: Callable[[str, str], object] | None
    graded: bool


@cache
def load_verifier(extension: Extension) -> LoadedVerifier:
    """A function `(prompt, response, answer)`, or an object with it as `score`. Raises ExtensionError."""
    target = load(extension)
    graded = getattr(target, "graded", False)
    if not isinstance(graded, bool):
        raise ExtensionError(f"its attribute graded is {graded!r}", "graded = True or False")
    if inspect.isclass(target) or not hasattr(target, "score"):
        score = function(target, extension.attribute, ("prompt", "response", "answer"), "a function, or an object with")
    else:
        score = method(target, "score", ("prompt", "response", "answer"))
    return LoadedVerifier(
        score,
        _optional(target, "check", ("prompt", "answer")),
        _optional(target, "answer_of", ("prompt", "response")),
        graded,
    )


@cache
def load_reader(extension: Extension) -> Callable[[Path], object]:
    """A function `(path)` that yields the rows of a data set. Raises ExtensionError."""
    return function(load(extension), extension.attribute, ("path",), "a function")


@cache
def load_template(extension: Extension) -> Callable[[list[dict[str, str]], Any], object]:
    """A function `(messages, tokenizer)` that returns the text that the model reads. Raises ExtensionError."""
    return function(load(extension), extension.attribute, ("messages", "tokenizer"), "a function")


# The methods of `rollout.engine.Engine` and their parameters (a test compares them).
ENGINE_METHODS = {
    "start": ("requests", "sampling"),
    "load_weights": ("weights", "version"),
    "differences": ("weights",),
    "health": (),
    "close": (),
}


# What a user's engine may say that it keeps, in its attribute `sampling`. A temperature above 0 it must keep.
SAMPLING = ("greedy", "top_p", "top_k", "min_p", "stop", "seed")


class LoadedEngine(NamedTuple):
    """The class of a user's engine, called with an `EngineSetup`. `background`: it generates while others work.

    `sampling`: the settings that it keeps besides a temperature above 0, of `SAMPLING`.
    """

    make: Callable[[Any], Any]
    background: bool
    sampling: frozenset[str]


@cache
def load_engine(extension: Extension) -> LoadedEngine:
    """A class `(setup)` with the methods of `rollout.engine.Engine`. Raises ExtensionError.

    It must be a class, so that its methods are known before an engine is created.
    """
    target, name = load(extension), extension.attribute
    if not inspect.isclass(target):
        raise ExtensionError(f"{name} is {shown(target)}, which is no class", f"name a class: class {name.title()}")
    for own, parameters in ENGINE_METHODS.items():
        if not hasattr(target, own):
            raise ExtensionError(f"the class {name} has no method {own}", f"define {own}({', '.join(parameters)})")
        _takes(getattr(target, own), f"{name}.{own}", ("self", *parameters), f"def {own}(")
    _takes(target, name, ("setup",), "def __init__(self, ")
    background = getattr(target, "background", False)
    if not isinstance(background, bool):
        raise ExtensionError(f"its attribute background is {shown(background)}", "background = True or False")
    sampling = getattr(target, "sampling", ())
    if not isinstance(sampling, list | tuple | set | frozenset) or not set(map(str, sampling)) <= set(SAMPLING):
        names = ", ".join(f'"{name}"' for name in SAMPLING)
        raise ExtensionError(f"its attribute sampling is {shown(sampling)}", f"sampling = ({names}), or some of these")
    return LoadedEngine(target, background, frozenset(map(str, sampling)))


@cache
def load(extension: Extension) -> Any:
    """The object that an extension names. Raises ExtensionError with the module's own error and its location."""
    try:
        module = importlib.import_module(extension.module)
    except Exception as error:
        raise _import_failed(extension, error) from error
    try:
        return getattr(module, extension.attribute)
    except AttributeError as error:
        names = [name for name in vars(module) if not name.startswith("_")]
        close = get_close_matches(extension.attribute, names) or names
        wrong = f"the module {extension.module} ({getattr(module, '__file__', None)}) has no {extension.attribute}"
        raise ExtensionError(wrong, f"one of {', '.join(close) or '(it is empty)'}") from error


def digests(plain: Any) -> dict[str, str]:
    """SHA-256 of the files of the loaded modules that a plain config (`schema.to_plain`) names, by the object's name.

    Modules that these import in their turn are not included.
    """
    if isinstance(plain, dict | list):
        values = plain.values() if isinstance(plain, dict) else plain
        return {name: digest for value in values for name, digest in digests(value).items()}
    if not isinstance(plain, str) or not _NAME.fullmatch(plain):
        return {}
    file = getattr(sys.modules.get(Extension(plain).module), "__file__", None)
    return {plain: hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {}


def function(target: Any, name: str, parameters: Sequence[str], kind: str) -> Callable[..., Any]:
    """`target` if these positional parameters fit it. Raises ExtensionError."""
    form = f"{name}({', '.join(parameters)})"
    if inspect.isclass(target):
        raise ExtensionError(
            f"{name} is a class", f"name an instance of it, made in the module: {name.lower()} = {name}()"
        )
    if not callable(target):
        raise ExtensionError(f"{name} is {shown(target)}, which cannot be called", f"define {kind} {form}")
    _takes(target, name, parameters, f"def {name}(")
    return target


def _takes(target: Any, name: str, parameters: Sequence[str], fix: str) -> None:
    """Raises ExtensionError if these positional parameters do not fit `target`. `fix`: how the message begins."""
    form = ", ".join(parameters)
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # a builtin without a signature
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        wrong = f"{name}{signature} cannot be called as {name}({form}): {error}"
        raise ExtensionError(wrong, f"{fix}{form})") from error


def call_failed(extension: Extension, error: Exception) -> ExtensionError:
    """The error to raise if an extension's function raised `error`."""
    return ExtensionError(f"{extension} raised {described(error)}", "correct it; the error is the extension's own")


def wrong_result(extension: Extension, returned: object, expected: str) -> ExtensionError:
    """The error to raise if an extension's function returned something else than its kind requires."""
    return ExtensionError(f"{extension} returned {shown(returned)}", f"return {expected}")


def described(error: BaseException) -> str:
    """An error with its type and the file and line that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.filename is not None:
        place = f" ({error.filename}:{error.lineno})"
        return f"{type(error).__name__}: {error.msg}{place}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def short_name(name: str) -> str:
    """The attribute of an extension's name, for tables; the name of a built-in is unchanged.

    >>> short_name("import:my_methods.reinforce:method"), short_name("ppo")
    ('method', 'ppo')
    """
    return name.rpartition(":")[2]


def shown(value: object) -> str:
    """A value and its type, shortened.

    >>> shown("right")
    "'right' (str)"
    """
    if value is None:
        return "None"
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"


def _import_failed(extension: Extension, error: Exception) -> ExtensionError:
    package = extension.module.partition(".")[0]
    parents = [extension.module[: match.start()] for match in re.finditer(r"\.", extension.module)]
    if isinstance(error, ModuleNotFoundError) and error.name in (*parents, extension.module):
        fix = f"install the package, or put the folder that holds {package} on PYTHONPATH"
        return ExtensionError(f"there is no module {error.name}", fix)
    return ExtensionError(f"importing {extension.module} raised {described(error)}", "correct the module")


def _is_machinery(filename: str) -> bool:
    """Whether a frame is the loader's: Python's import system, or this file."""
    return filename.startswith("<frozen importlib") or filename in (importlib.__file__, __file__)


def method(target: Any, name: str, parameters: Sequence[str]) -> Callable[..., Any]:
    form = f"{name}({', '.join(parameters)})"
    if inspect.isclass(target):
        raise ExtensionError(f"{target.__name__} is a class", "name an instance of it, made in the module")
    if not hasattr(target, name):
        raise ExtensionError(f"{shown(target)} has no method {name}", f"define {form}")
    return function(getattr(target, name), name, parameters, "a method")


def _optional(target: Any, name: str, parameters: Sequence[str]) -> Callable[..., Any] | None:
    return method(target, name, parameters) if hasattr(target, name) else None
