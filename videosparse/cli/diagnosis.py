"""`videosparse doctor`."""

from __future__ import annotations

from videosparse.cli.console import Debug, guard, memory, rows


def doctor(debug: Debug = False) -> None:
    """Show versions, GPUs, the attention kernels that would run, and whether the embedded model is here."""
    with guard(debug):
        from videosparse.generation.environment import devices, versions

        rows([(name, version or "not installed") for name, version in versions().items()])
        for device in devices():
            where = f"{device.name}, {memory(device.memory)}"
            if device.capability:
                where += f", compute capability {device.capability}"
            rows([(device.device, where), ("", f"backend auto takes {device.backend}: {device.reason}")])
        rows([("tiny-wan", _embedded())])


def _embedded() -> str:
    from videosparse.generation import GenerationError, embedded_model_path

    try:
        return str(embedded_model_path())
    except GenerationError as error:
        return str(error)
