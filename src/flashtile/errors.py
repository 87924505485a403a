"""The exceptions that flashtile raises on purpose; everything else is a bug of ours."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module


class FlashtileError(Exception):
    """Base of every exception that flashtile raises on purpose."""


class InvalidArgument(FlashtileError, ValueError):
    """A call that no backend could serve, because one of its arguments is wrong.

    The text and the attributes name the argument, what it got, what was wanted and the remedy.
    """

    def __init__(self, argument: str, got: str, wanted: str, remedy: str) -> None:
        self.argument = argument
        self.got = got
        self.wanted = wanted
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.argument}: got {self.got}; wanted {self.wanted}. Remedy: {self.remedy}"

    def __reduce__(self):
        return type(self), (self.argument, self.got, self.wanted, self.remedy)


def invalid(argument: str, *, got: str, wanted: str, remedy: str) -> InvalidArgument:
    """The exception to raise in code that ``torch.compile`` traces.

    With ``fullgraph=True`` its error text quotes an exception's arguments, but only positional ones, and only if
    ``__init__`` does not call ``super()``.
    """
    return InvalidArgument(argument, got, wanted, remedy)


class UnsupportedProblem(FlashtileError, NotImplementedError):
    """A correct call that the allowed backends decline; ``reasons`` has each backend's own words."""

    def __init__(self, headline: str, reasons: Mapping[str, tuple[str, ...]]) -> None:
        self.headline = headline
        self.reasons = dict(reasons)
        lines = [f"  {backend}: {'; '.join(why)}" for backend, why in self.reasons.items()]
        super().__init__("\n".join([headline, *lines]))

    def __reduce__(self):
        return type(self), (self.headline, self.reasons)


class FallbackRefused(UnsupportedProblem):
    """Strict mode is on and only the naive formula would have served the call."""


class MissingExtra(FlashtileError, ImportError):
    """A command needs a package of an optional extra that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"{package} is not installed. Remedy: pip install 'flashtile[{extra}]'")

    def __reduce__(self):
        return type(self), (self.package, self.extra)


class NameTaken(FlashtileError, ImportError):
    """A module that flashtile was asked to stand in for is loaded already."""


def require(*packages: str, extra: str) -> None:
    """Finds out whether packages of an optional extra are there, before the work that needs them.

    Raises:
        MissingExtra: one is not; names it and the extra.
    """
    package = ""
    try:
        for package in packages:
            import_module(package)
    except ImportError as error:
        raise MissingExtra(package, extra) from error
