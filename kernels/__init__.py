# Only `lmoe.kernels` is an import name of this folder. Another library may import it by path under
# a name of its own; then it stays empty.
if __name__ == "lmoe.kernels":
    from lmoe.kernels.ops import *  # noqa: F403
