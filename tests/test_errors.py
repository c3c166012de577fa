"""Every error of the project crosses from one process to another as what it is: Ray pickles them."""

import importlib
import pickle
import pkgutil
from collections.abc import Callable, Iterator

import pytest

import serve_app
import trainers
import tunesmith
from tunesmith.errors import TunesmithError

OWN: dict[str, Callable[[type], Exception]] = {
    "HungError": lambda kind: kind(20.0, spoke=[0], silent=[1]),
}
"""How errors are made whose arguments are their own."""


def error_classes() -> Iterator[type[Exception]]:
    for package in (tunesmith, trainers, serve_app):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Programs that run when they are imported.
            if "migrations.env" not in module.name and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    known: list[type[Exception]] = [Exception]
    for kind in known:
        known += [each for each in kind.__subclasses__() if each not in known]
    yield from (kind for kind in known if kind.__module__.partition(".")[0] in ("tunesmith", "trainers", "serve_app"))


def make(kind: type[Exception]) -> Exception:
    if kind.__name__ in OWN:
        return OWN[kind.__name__](kind)
    if issubclass(kind, TunesmithError):
        return kind("no column 'q'", fields=["prompt_field"], hint="columns are a, b", code="missing_column")
    return kind("no column 'q'")


@pytest.mark.parametrize("kind", list(error_classes()), ids=lambda kind: kind.__name__)
def test_an_error_pickles_whole(kind: type[Exception]) -> None:
    error = make(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    if isinstance(error, TunesmithError):
        assert again.as_dict() == error.as_dict()
