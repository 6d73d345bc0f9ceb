"""Plans in the languages and files of other tools; what each can run is data in ``rules/``."""
