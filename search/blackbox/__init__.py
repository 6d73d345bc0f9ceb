"""Searches on measured KL that share an Optuna study."""
