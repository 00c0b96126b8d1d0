"""Random calls and files against the package, in child processes; each module is a command."""
