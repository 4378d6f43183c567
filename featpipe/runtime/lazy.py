"""Lazy imports of a package's public names."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path


def lazy_imports(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` for a package that imports some of its public names on first use.

    The names are those that the package imports under ``if TYPE_CHECKING:``, so type checkers and editors see what is
    imported at run time. The module of each name is read from the package's source when the first one is used.

    Parameters
    ----------
    package : str
        The ``__name__`` of the package.

    Examples
    --------
    ::

        if TYPE_CHECKING:
            from featpipe.cache.reader import FeatureCache
        else:
            __getattr__, __dir__ = lazy_imports(__name__)
    """

    @cache
    def find_modules() -> dict[str, str]:
        source = Path(str(sys.modules[package].__file__)).read_text("utf-8")
        blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
        imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
        return {alias.name: str(node.module) for node in imports for alias in node.names}

    def get_attribute(name: str) -> object:
        if name.startswith("__") or name not in find_modules():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(find_modules()[name]), name)

    return get_attribute, lambda: sorted(sys.modules[package].__all__)
