"""How other runtimes lay packed weights out."""
