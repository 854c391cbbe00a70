from lmoe.kernels.chunk.differentiated import differentiated
from tests.toys.mini_batch import MINI_BATCH, run

state, fwd, dstate, bwd, step, shapes = differentiated(MINI_BATCH, run)
