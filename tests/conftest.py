"""What tests of all folders share."""

import logging

import pytest

PROGRAMS = {"cli", "eval", "lora", "pipelines"}
"""Folders whose tests call programs and the command in their own process."""


@pytest.fixture(autouse=True)
def _as_loud_as_before(request):
    """Programs hush libraries to the end of their process, in which the tests after them would hear nothing."""
    if request.path.parent.name not in PROGRAMS:
        yield
        return
    import diffusers
    import transformers

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "torch")]
    levels = [log.level for log in loggers]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    yield
    for log, level in zip(loggers, levels, strict=True):
        log.setLevel(level)
    for library, shown in zip(libraries, bars, strict=True):
        if shown:
            library.enable_progress_bar()
