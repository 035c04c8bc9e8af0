"""Lists the packages of jasper_fast, and builds the native libraries with csrc/build.py.

pip install -e . --no-build-isolation      for work in a checkout (make install does it)
python setup.py build_native               rebuild the native libraries in place (incremental, seconds)
"""

import runpy
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildNative(Command):
    """Compiles csrc/ into jasper_fast/lib/ of a wheel. Run alone or for an editable install, it compiles into the
    checkout."""

    description = "build the native libraries (in place when run alone)"
    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.made = []

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        wheel = "build" in self.distribution.command_obj and not self.editable_mode
        base = Path(self.get_finalized_command("build").build_lib) if wheel else ROOT
        self.made = runpy.run_path(str(ROOT / "csrc" / "build.py"))["compile_libraries"](base / "jasper_fast" / "lib")

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(p) for p in self.made]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class BuildPython(build_py):
    """Packs train.py, which is at the top of a checkout, as jasper_fast.train, and takes no modules from csrc."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir) if package != "jasper_fast.csrc" else []
        return [*found, (package, "train", "train.py")] if package == "jasper_fast" else found


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class Wheel(bdist_wheel):
    """Builds one wheel per platform, because the native libraries do not depend on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["jasper_fast", "jasper_fast.*"]),
        "jasper_fast.configs",
        "jasper_fast.csrc",
        "jasper_fast.kernels",
        *(f"jasper_fast.kernels.{p}" for p in find_packages("kernels")),
        "jasper_fast.bench",
        *(f"jasper_fast.bench.{p}" for p in find_packages("bench")),
    ],
    package_dir={f"jasper_fast.{folder}": folder for folder in ("kernels", "configs", "csrc", "bench")},
    package_data={
        "jasper_fast": ["page.html.j2"],
        "jasper_fast.data.prepare": ["*.j2"],
        "jasper_fast.inference": ["*.j2"],
        "jasper_fast.demo": ["*.j2"],
        "jasper_fast.configs": ["*.yaml"],
        "jasper_fast.csrc": ["cuda/*.cuh"],
        "jasper_fast.kernels": ["README.md", "tables/README.md", "tables/*.json"],
        "jasper_fast.bench": ["compiled/*.json"],
        "jasper_fast.bench.report": ["page.css", "published.json", "*.j2"],
    },
    include_package_data=False,  # MANIFEST.in is for the sdist: it has bench/quick, which no wheel needs
    distclass=Binary,
    cmdclass={"build": Build, "build_native": BuildNative, "build_py": BuildPython, "bdist_wheel": Wheel},
)
