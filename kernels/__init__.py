"""Triton kernels of cvfast; import them as `cvfast.kernels`.

Nothing is imported here: Triton is an optional dependency, needed by the modules only.
"""

if __name__ == "kernels":
    raise ImportError(
        "this `kernels` is a folder of cvfast's source tree: import it as `cvfast.kernels`. If you "
        "meant the package `kernels` of PyPI, run from another folder than cvfast's source tree, "
        "or take that folder off sys.path"
    )
