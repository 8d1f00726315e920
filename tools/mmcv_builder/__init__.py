"""Builds mmcv with its compiled ops for the torch of this environment.

Run it with the interpreter that shall get mmcv; it needs torch there, a C++
compiler and the package registry, and nothing else that is not in Python:

    python -m mmcv_builder        (in a checkout: python tools/build_mmcv.py)

If mmcv's ops already run, it does nothing. Otherwise it takes the source from
the registry, compiles it with the C++ standard this torch needs, without debug
information and with a precompiled header (gcc and clang), proves the result by
running NMS and RoIAlign, and installs it. Finished wheels stay in the user's
cache folder, so that a second environment with the same versions gets its mmcv
within seconds.

It is a package of its own because it must import before mmcv and everything
that needs mmcv is there: only the standard library, and rich for the bar.
"""
