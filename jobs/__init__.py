"""Resumable runs: who runs what, stage by stage, and where it is kept."""
