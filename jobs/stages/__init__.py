"""The stages of a search, one file each: each keeps what it found in the run folder."""
