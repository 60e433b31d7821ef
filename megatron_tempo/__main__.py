"""`python -m megatron_tempo`, for torchrun, and the command `megatron-tempo`."""

import signal
import sys


def main() -> int:
    """The exit status of the command line. Ctrl-C during the imports, a second, ends the process silently."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_tempo import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
