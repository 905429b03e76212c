"""Exceptions. Each derives from :class:`WorldloomError` and from the builtin a caller would expect to catch."""


class WorldloomError(Exception):
    """Base of everything that worldloom raises on purpose."""

    def __init__(self, *args: object):
        # What a message quotes may come from a file, and be as long as the file.
        super().__init__(*(f"{a[:700]} … {a[-200:]}" if isinstance(a, str) and len(a) > 950 else a for a in args))


class ConfigError(WorldloomError, ValueError):
    """A config value is out of its range, or values contradict each other."""


class UnknownFieldError(ConfigError, TypeError):
    """A config was given a field it does not have; the message names the nearest one."""


class UnknownModelError(WorldloomError, LookupError):
    """A model name or path names nothing; the message lists what there is."""


class DataError(WorldloomError, ValueError):
    """Arrays have a wrong shape, dtype, range or length, or hold NaN; nothing of them was stored."""


class FileFormatError(WorldloomError, ValueError):
    """A file is truncated, damaged, too large for its header, or of a kind that is not read for safety."""


class WeightsError(WorldloomError, ValueError):
    """Weights do not fit the model: missing, unexpected or differently shaped arrays."""


class DeviceError(WorldloomError, RuntimeError):
    """A device that was asked for by number or kind is not there; the message lists what is."""


class CheckpointError(WorldloomError, RuntimeError):
    """A checkpoint could not be written, or none of those present can be read."""


class NonFiniteError(WorldloomError, FloatingPointError):
    """A loss or gradient became NaN or infinite; the message names step, term and the last good checkpoint."""


class EnvError(WorldloomError, RuntimeError):
    """An environment failed and restarting it did not help, or it was used after ``close``; the message says why."""


class MissingDependencyError(WorldloomError, ImportError):
    """An optional package is needed; the message says which extra brings it."""
