"""What several folders need and no user calls: checks, files, modes of a network, versions, the process itself."""
