"""Our rounding methods against the contract."""

from bitplan.quantizers.methods import METHODS
from bitplan.testing import MethodContract


class TestMethods(MethodContract):
    plugins = METHODS.names()
