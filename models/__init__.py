"""What a model is and how it runs: loading, units, renderings, measurements."""
