"""Configurations and folders that other runtimes read."""
