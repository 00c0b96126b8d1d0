"""Private helpers shared by several folders: argument checks, errors, files, modes of a network, the process itself."""
