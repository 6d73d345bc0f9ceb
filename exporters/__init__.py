"""Writers of the formats other runtimes read; ``rules/`` says what each of them can run."""
