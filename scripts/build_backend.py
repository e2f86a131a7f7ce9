"""setuptools' build backend, and one line instead of pip's traceback where there is no setuptools.

A bare environment of Python >= 3.12 is such a place. torch brings setuptools along, so an
environment without it has no torch either, and the advice is the same as setup.py's.
"""

try:
    from setuptools.build_meta import *  # noqa: F403
except ImportError:
    raise SystemExit(
        "flashinfer_lite: building needs torch and setuptools, got no setuptools: "
        "install torch>=2.11 first, then: pip install --no-build-isolation ."
    ) from None
