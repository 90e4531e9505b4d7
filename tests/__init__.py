"""A package: some libraries install a directory of this name, which would be found in its place."""
