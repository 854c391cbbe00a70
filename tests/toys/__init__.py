"""Families and mixers that live in the tests, one for each thing that a coming mixer will need."""

from tests.toys.layers import FirstValue, Memories, Selective, Turning
from tests.toys.mini_batch import MiniBatch
from tests.toys.rotor import Rotor

TOYS = {
    "mini_batch": MiniBatch,
    "rotor": Rotor,
    "turning": Turning,
    "selective": Selective,
    "first_value": FirstValue,
    "memories": Memories,
}
