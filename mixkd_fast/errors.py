"""The errors a user meets. Each message names the field, its value and what is allowed."""


class MixKDError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigurationError(MixKDError, ValueError):
    """A configuration field is unknown, of the wrong type, out of range or contradicts another."""


class DataError(MixKDError, ValueError):
    """A file, a column, a label or a split is missing or not what the task says."""


class ModelError(MixKDError, ValueError):
    """A model or tokenizer cannot be loaded, or does not fit the task or its partner."""


class CheckpointError(MixKDError, RuntimeError):
    """A checkpoint is incomplete, altered, of another run, or cannot be written."""


class NonFiniteError(MixKDError, ArithmeticError):
    """A loss term or a gradient is NaN or infinite."""


class Interrupted(MixKDError):
    """SIGTERM or SIGINT asked the run to stop; the work done so far is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
