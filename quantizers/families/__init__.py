"""Families of formats, one file per family: names, bytes, traits, and what weights become."""

from __future__ import annotations

from ..format import FAMILIES as FAMILIES
from ..format import Family as Family
