"""Our families of formats against the contract."""

from bitplan.quantizers.format import FAMILIES
from bitplan.testing import FamilyContract


class TestFamilies(FamilyContract):
    plugins = FAMILIES.names()
