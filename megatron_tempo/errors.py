"""Errors that a user can mend."""


class InputError(ValueError):
    """Something given to the program does not fit: a file, a folder, a checkpoint.

    The message names it and the fix; the command line prints it without a traceback.
    """
