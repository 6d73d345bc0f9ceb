"""What every part may import: plugins, files, progress, threads. Nothing of the domain."""
