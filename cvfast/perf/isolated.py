"""A call in a Python process of its own, which inherits no thread pool, cache or memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")


def call(
    function: Callable[..., T],
    /,
    *args: Any,
    environment: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> T:
    """`function(*args, **kwargs)`, in a fresh process that ends with it.

    Args:
        function: of a module's top level; it, its arguments and its result must be picklable.
        environment: variables to set in the process beside those of this one.

    Raises:
        RuntimeError: if the process died; else what the function raised.
    """
    with (
        _variables(environment or {}),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
