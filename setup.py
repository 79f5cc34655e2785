"""The native engine; everything else about the package is in setup.cfg."""

from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("el_convert/kernels/source")

setup(
    ext_modules=[
        Extension(
            "el_convert.kernels._engine",
            sorted(map(str, SOURCE.glob("*.cpp"))),
            depends=sorted(str(path) for kind in ("*.h", "*.inl") for path in SOURCE.glob(kind)),
            # Each file asks for its own instruction set: these are the flags of any machine.
            extra_compile_args=[
                "-O3",
                "-std=c++11",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-g0",
            ],
            language="c++",
            optional=True,  # without a compiler packed layers run in plain torch
        )
    ]
)
