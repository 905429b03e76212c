"""Training where environments, replay and updates are all on the device."""
