"""Compiles csrc/ into two shared libraries on PyTorch's stable ABI, incrementally, with ninja.

    python csrc/build.py                        rebuild jasper_fast/lib/*.so in place (setup.py does the same)
    python csrc/build.py --sanitize address     the CPU library with AddressSanitizer and UBSan, in build/sanitize/
    python csrc/build.py --sanitize thread      the same with ThreadSanitizer (`make sanitize` runs tests with both)

JASPER_FAST_CUDA=0 skips the CUDA library. JASPER_FAST_CUDA_ARCHS="80;90a" chooses its architectures. The default is
those of the GPUs in this machine, or 75, 80 and 90a if there is no GPU; "all" means all of CUDA_ARCHS that nvcc knows.
CXX names the C++ compiler. The CPU library needs a C++20 compiler and torch's headers. The CUDA library also needs
nvcc, but neither a GPU nor a torch with CUDA. One build serves every Python, because no Python headers are used, and
every torch from 2.11 on.
"""

import argparse
import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "native"
COMMON = "-O3 -std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11
CPU_FLAGS = "-fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wno-unknown-pragmas -Wno-psabi"
ISAS = {"generic": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = f"{ISAS['avx2']} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
    ISAS["avx512_bf16"] = f"{ISAS['avx512']} -mavx512bf16"
SANITIZE = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    # ThreadSanitizer understands the barriers of std::thread but not those of torch's OpenMP (see csrc/cpu/tasks.h).
    "thread": "-fsanitize=thread -DJF_STD_THREADS -pthread",
}
CUDA_ARCHS = "75;80;86;89;90a;100;120"
# One architecture for each inner loop of the convs. sm_86 and sm_89 run the code of 80. Newer GPUs compile the PTX of
# 80 at loading.
WITHOUT_GPU = "75;80;90a"


def torch_dir() -> Path | None:
    """Returns the folder of torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def gpu_archs() -> list[str]:
    """Returns the architectures of the GPUs that nvidia-smi lists, such as ["90a"]; empty if it finds no GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    done = subprocess.run([command, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    words = done.stdout.split() if done.returncode == 0 else []  # else stdout has an error message
    found = sorted({int(word.replace(".", "")) for word in words if re.fullmatch(r"\d+\.\d", word)})
    return [f"{arch}a" if arch == 90 else str(arch) for arch in found]


def cuda_archs(nvcc: str) -> list[str]:
    """Returns the architectures to build for: those asked for, or those of this machine's GPUs, or WITHOUT_GPU."""
    asked = re.findall(r"[^;,\s]+", os.environ.get("JASPER_FAST_CUDA_ARCHS", "").replace(".", ""))
    if asked and asked != ["all"]:
        return asked
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    wanted = CUDA_ARCHS.split(";") if asked else gpu_archs() or WITHOUT_GPU.split(";")
    return [a for a in wanted if f"compute_{a.rstrip('a')}" in known] or WITHOUT_GPU.split(";")


def gencode(nvcc: str) -> str:
    """Returns -gencode flags. They add the PTX of the newest architecture without the suffix a, for newer GPUs."""
    archs = cuda_archs(nvcc)
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    general = sorted((a for a in archs if a.isdigit()), key=int)
    return " ".join([*flags, *(f"-gencode arch=compute_{a},code=compute_{a}" for a in general[-1:])])


def shell(*words: str | Path) -> str:
    """Returns the words of a command quoted for the shell and for ninja, because paths may contain spaces."""
    return shlex.join(map(str, words)).replace("$", "$$")


def ninja_file(torch: Path, cxx: str, nvcc: str | None, sanitize: str | None = None) -> tuple[str, list[str]]:
    """Returns the text of build.ninja and the names of the libraries that it builds."""
    checks = f" -O1 -g1 -fno-omit-frame-pointer {SANITIZE[sanitize]}" if sanitize else ""
    include = shell("-isystem", torch / "include", f"-I{ROOT / 'csrc'}")
    link = shell(f"-L{torch / 'lib'}", "-ltorch_cpu")
    cxx = shell(cxx) if shutil.which(cxx) else cxx  # CXX may also be a command with arguments, such as "ccache g++"

    def path(source: Path) -> str:
        return re.sub(r"[$ :]", r"$\g<0>", str(source))

    text = [
        f"rule cxx\n  command = {cxx} {COMMON} {CPU_FLAGS}{checks} {include} $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $out",
        f"rule link\n  command = {cxx} -shared{checks} -Wl,--no-undefined $in {link} -o $out",
        "  description = link $out",
    ]
    objects = {f"cpu/{source.stem}.o": path(source) for source in sorted((ROOT / "csrc/cpu").glob("*.cpp"))}
    objects |= {
        f"cpu/{source.stem}.{isa}.o": f"{path(source)}\n  isa = -DJF_ISA={isa} {flags}"
        for source in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp"))
        for isa, flags in ISAS.items()
    }
    text += [f"build {name}: cxx {source}" for name, source in objects.items()]
    libraries = ["libjasper_fast_cpu.so"]
    text.append(f"build {libraries[0]}: link {' '.join(objects)}")
    cuda = sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc else []
    if cuda:
        flags = (
            f"{COMMON} -DUSE_CUDA -lineinfo --expt-relaxed-constexpr -Xptxas -v,--warn-on-spills "
            "-Xcompiler -fPIC,-fvisibility=hidden --threads 2"
        )
        # A CPU-only torch has no libtorch_cuda.so. Linking with an empty library of that name writes the right
        # DT_NEEDED entry.
        text += [
            f"rule nvcc\n  command = {shell(nvcc)} -ccbin {cxx} {flags} {gencode(nvcc)} {include}"
            " -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
            "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
            f"rule stub\n  command = echo | {cxx} -shared -x c++ - -Wl,-soname,libtorch_cuda.so -o $out",
            "  description = stub $out",
            f"rule cudalink\n  command = {shell(nvcc)} -ccbin {cxx} -shared $in {link} $stub -o $out",
            "  description = link $out",
            "build cuda/libtorch_cuda.so: stub",
        ]
        names = [f"cuda/{source.stem}.o" for source in cuda]
        text += [f"build {name}: nvcc {path(source)}" for name, source in zip(names, cuda, strict=True)]
        text += [
            f"build libjasper_fast_cuda.so: cudalink {' '.join(names)} | cuda/libtorch_cuda.so",
            "  stub = -Xlinker --no-as-needed -Xlinker cuda/libtorch_cuda.so",
        ]
        libraries.append("libjasper_fast_cuda.so")
    return "\n".join(text) + "\n", libraries


def compile_libraries(target: Path, sanitize: str | None = None) -> list[Path]:
    """Builds the libraries that this machine can build and puts them into `target`. Returns their paths.

    Prints which library is left out, and why. sanitize: a key of SANITIZE builds only the CPU library, with these
    sanitizers; None builds the usual libraries.
    """
    work = target / "objects" if sanitize else WORK
    torch = torch_dir()
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    needs = {
        "no torch to build against: install torch first and use --no-build-isolation": torch,
        "no C++ compiler: install g++ or clang++, or set CXX": cxx,
        "no ninja: pip install ninja": importlib.util.find_spec("ninja"),
    }
    if missing := [reason for reason, found in needs.items() if found is None]:
        return skip(missing[0], "CPU and CUDA")
    wanted = os.environ.get("JASPER_FAST_CUDA", "1") != "0" and not sanitize
    nvcc = find_nvcc() if wanted else None
    if nvcc is None and not sanitize:
        skip("no nvcc: put it on PATH or set CUDA_HOME" if wanted else "JASPER_FAST_CUDA=0", "CUDA")
    work.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one checkout wait for each other
        text, names = ninja_file(torch, cxx, nvcc, sanitize)
        ninja = work / "build.ninja"
        if not ninja.exists() or ninja.read_text() != text:
            ninja.write_text(text)
        made, failed = [], []
        for name in names:  # one by one, so that the CPU library is built even if the CUDA one does not compile
            if subprocess.call([sys.executable, "-m", "ninja", "-C", str(work), name]):
                failed.append(name)
            else:
                made.append(install(work / name, target / name))
        if failed:
            hint = "" if failed == names[:1] else " (JASPER_FAST_CUDA=0 leaves out the CUDA library)"
            sys.exit(f"jasper_fast: {' and '.join(failed)} did not build, see above{hint}")
        for stale in set(target.glob("*.so")) - set(made):
            stale.unlink()
    return made


def install(built: Path, place: Path) -> Path:
    """Copies `built` to `place` atomically if they differ. A process that has loaded the old library keeps it."""
    if not place.exists() or place.read_bytes() != built.read_bytes():
        shutil.copy2(built, place.with_suffix(".tmp"))
        os.replace(place.with_suffix(".tmp"), place)
    return place


def skip(reason: str, what: str) -> list[Path]:
    print(f"jasper_fast: the {what} library is left out ({reason})", file=sys.stderr, flush=True)
    return []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="compile csrc/ into jasper_fast/lib")
    parser.add_argument("--sanitize", choices=SANITIZE, help="build only the CPU library, with this sanitizer")
    kind = parser.parse_args().sanitize
    compile_libraries(ROOT / "build" / "sanitize" / kind if kind else ROOT / "jasper_fast" / "lib", kind)
