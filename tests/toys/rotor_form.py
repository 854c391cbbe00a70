from lmoe.kernels.chunk.differentiated import differentiated
from tests.toys.rotor import ROTOR, decay_of, run

state, fwd, dstate, bwd, step, shapes = differentiated(ROTOR, run, decay_of)
