"""The command line's parts besides dispatch: arguments and help, the terminal, and the commands of one file each."""
