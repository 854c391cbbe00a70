"""The families of recurrences: a new one is one file and one line here, and all tests run on it."""

from lmoe.kernels.families.delta import DELTA
from lmoe.kernels.families.gla import GLA
from lmoe.kernels.families.ssd import SSD

FAMILIES = {family.name: family for family in (SSD, GLA, DELTA)}
