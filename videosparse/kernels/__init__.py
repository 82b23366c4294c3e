"""The only door to attention kernels: `attend`."""

from videosparse.kernels.options import KernelOptions

__all__ = ["KernelOptions"]
