"""Packaging. All compiling is CMake's: this runs it once, which adds two libraries to the package.

torch_mics is built against the torch that is installed, so build isolation must be off:

    pip install --no-build-isolation .
    pip install --no-build-isolation -e .     to work on it
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_TREE = ROOT / ".build" / "python"  # kept, so that the next build is incremental
SETUPTOOLS_TREE = ROOT / ".build" / "setuptools"

EXTRAS = {
    "plan": ["rich", "matplotlib", "scipy"],
    "examples": ["jsonargparse", "rich", "tokenizers", "matplotlib"],
    "hf": ["safetensors", "transformers"],
    "peers": ["deepspeed==0.18.9"],  # of benchmarks/train_bench; the last with MiCS
    "gpu": ["pytest", "rich"],  # of tests/gpu.sh
    "dev": [
        "pyyaml",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "scipy",
        "clang-format==23.1.3",
        "safetensors",
        "transformers",
    ],
}


def read_version() -> str:
    text = (ROOT / "python" / "torch_mics" / "_version.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit("python/torch_mics/_version.py must set __version__.")
    return found.group(1)


class CMakeBuild(build_ext):
    """Builds and installs the Python component of the CMake project."""

    def run(self) -> None:
        # Found but not imported: that would cost seconds, even when there is nothing to build.
        torch = find_spec("torch")
        if torch is None or torch.origin is None:
            raise SystemExit(
                f"torch_mics is built against the installed torch, but {sys.executable} has none."
                " Install torch, then run: pip install --no-build-isolation ."
            )
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("torch_mics needs CMake 3.22 or newer. Run: pip install cmake")

        configure = [cmake, "-S", str(ROOT), "-B", str(BUILD_TREE)]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('MICS_BUILD_TYPE', 'Release')}",
            "-DMICS_BUILD_PYTHON=ON",
            "-DMICS_BUILD_TESTS=OFF",
        ]
        # A tree configured for another interpreter or torch keeps paths into it: start it again.
        # An unchanged one is not configured again; the build does so when a CMakeLists.txt changed.
        torch_version = Path(torch.origin).with_name("version.py").read_text()
        fingerprint = "\n".join([*configure, torch.origin, torch_version])
        marker = BUILD_TREE / "configured_for"
        if not marker.exists() or marker.read_text() != fingerprint:
            shutil.rmtree(BUILD_TREE, ignore_errors=True)
            subprocess.run(configure, check=True)
            marker.write_text(fingerprint)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        # The tree may have tests too, which the package does not need.
        build = [cmake, "--build", str(BUILD_TREE), "--target", "_C", "--parallel", jobs]
        subprocess.run(build, check=True)
        subprocess.run(
            [cmake, "--install", str(BUILD_TREE), "--component", "python"]
            + ["--prefix", str(self._package_directory())],
            check=True,
        )

    def get_outputs(self) -> list[str]:
        directory = self._package_directory()
        return [
            str(p)
            for name in ("_C*.so", "libmics_core.so", "_built_for_torch.txt")
            for p in directory.glob(name)
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install finds the files in the source tree; nothing is to be linked

    def get_source_files(self) -> list[str]:
        """Names what a source distribution needs beside the Python files."""
        trees = ("include", "src", "python/csrc")
        files = [path for tree in trees for path in (ROOT / tree).rglob("*") if path.is_file()]
        files += [ROOT / "CMakeLists.txt", ROOT / "python" / "CMakeLists.txt"]
        return sorted(str(path.relative_to(ROOT)) for path in files)

    def _package_directory(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / "python" / "torch_mics"
        return Path(self.build_lib).resolve() / "torch_mics"


if __name__ == "__main__":
    os.chdir(ROOT)
    # `develop` of setuptools 80 and newer calls pip again, which must not isolate the build either.
    os.environ.setdefault("PIP_NO_BUILD_ISOLATION", "0")
    # setuptools never removes a file from here that the sources no longer have.
    shutil.rmtree(SETUPTOOLS_TREE, ignore_errors=True)
    readme = ROOT / "README.md"
    setup(
        name="torch-mics",
        version=read_version(),
        description="MiCS for PyTorch: sharded training over partition and replication groups",
        long_description=readme.read_text() if readme.exists() else "",
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        python_requires=">=3.10",
        install_requires=["torch>=2.11"],
        extras_require=EXTRAS,
        package_dir={"": "python"},
        packages=find_packages("python", include=["torch_mics", "torch_mics.*"]),
        package_data={
            "torch_mics": ["py.typed", "*.pyi"],
            "torch_mics.planner": ["data/*.json", "data/calibrations/*.json"],
            "torch_mics.published": ["data/*.json"],
        },
        entry_points={"console_scripts": ["torch_mics = torch_mics.cli:main"]},
        ext_modules=[Extension("torch_mics._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"build": {"build_base": str(SETUPTOOLS_TREE.relative_to(ROOT))}},
        zip_safe=False,
    )
