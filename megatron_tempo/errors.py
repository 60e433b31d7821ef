"""Errors that a user is told of in a line."""


class InputError(ValueError):
    """Something given to the program does not fit: a file, a folder, a checkpoint.

    The message names it and the fix; the command line prints it without a traceback.
    """


class EngineError(RuntimeError):
    """An engine that failed, or that answered what cannot be trained on."""


class Stopped(Exception):
    """A run that was told to stop. It stands in a checkpoint; the message says which."""


class NotFiniteError(ArithmeticError):
    """Losses or gradients of too many optimizer steps in a row were NaN or infinite. The message names the dump."""


class UnwrittenError(OSError):
    """A file that a run cannot go on without could not be written. The message names it, the reason and the fix."""
