"""Exceptions. Each derives from :class:`WorldloomError` and from the built-in exception that callers would catch."""


class WorldloomError(Exception):
    """Base class of all errors that worldloom raises deliberately."""

    def __init__(self, *args: object):
        # A message may quote a file's content, which can be as long as the file.
        super().__init__(*(f"{a[:700]} … {a[-200:]}" if isinstance(a, str) and len(a) > 950 else a for a in args))


class ConfigError(WorldloomError, ValueError):
    """A config value is out of its range, or values contradict each other."""


class UnknownFieldError(ConfigError, TypeError):
    """A config has no field of this name; the message suggests the nearest one."""


class UnknownModelError(WorldloomError, LookupError):
    """No model has this name or path; the message lists the known ones."""


class DataError(WorldloomError, ValueError):
    """Arrays have a wrong shape, dtype, range or length, or contain NaN; none of them was stored."""


class EnvContractError(DataError):
    """An environment returned what its spaces or Gymnasium's interface exclude; the message says what and where."""


class FileFormatError(WorldloomError, ValueError):
    """A file is truncated, damaged, of a size that its header contradicts, or of a kind that is unsafe to read."""


class WeightsError(WorldloomError, ValueError):
    """Weights do not match the model: arrays are missing, unexpected or of another shape."""


class DeviceError(WorldloomError, RuntimeError):
    """The requested device does not exist; the message lists the devices that do."""


class CheckpointError(WorldloomError, RuntimeError):
    """A checkpoint could not be written, or none of the existing ones can be read."""


class NonFiniteError(WorldloomError, FloatingPointError):
    """A loss or gradient became NaN or infinite; the message names the step, the term and the last good checkpoint."""


class EnvError(WorldloomError, RuntimeError):
    """An environment failed and restarting it did not help, or it was used after ``close``; the message says why."""


class MissingDependencyError(WorldloomError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""
