"""Errors that are shown to the user in one line, without a traceback."""


class InputError(ValueError):
    """Invalid input: a configuration, a file, a folder or a checkpoint. The message names it and the fix."""


class EngineError(RuntimeError):
    """An engine failed, or returned a response that cannot be trained on."""


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint. The message names it."""


class NotFiniteError(ArithmeticError):
    """Too many consecutive optimizer steps had a loss or gradient that is not finite. The message names the dump."""


class UnwrittenError(OSError):
    """A file that the run requires could not be written. The message names it, the reason and the fix."""
