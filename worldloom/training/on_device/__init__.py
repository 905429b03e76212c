"""Training where environments, replay and updates are all on the device."""

from worldloom.training.on_device.fit import fit_on_device, runs_on_device

__all__ = ["fit_on_device", "runs_on_device"]
