"""The commands of the command line, a file for each part; ``__main__`` puts them together."""
